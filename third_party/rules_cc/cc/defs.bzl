"""The names that Bazel's own packages load from @rules_cc, handed on to the native rules."""

cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite

def _nothing_impl(_ctx):
    return [platform_common.TemplateVariableInfo({})]

_nothing = rule(implementation = _nothing_impl)

def cc_flags_supplier(name, **_kwargs):
    _nothing(name = name)

def compiler_flag(name, **_kwargs):
    _nothing(name = name)
