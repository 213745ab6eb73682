"""The rules of our own code: warnings are errors, a test lies beside each C++ source."""

COPTS = [
    "-Wall",
    "-Wextra",
    "-Werror",
    # gcc 12 finds overlaps in `"text" + string` that are not there.
    "-Wno-restrict",
]

def smf_cc_library(name, deps = [], more_srcs = [], **kwargs):
    """A library of <name>.h and <name>.cc, of which either may be missing, and of `more_srcs`."""
    native.cc_library(
        name = name,
        srcs = native.glob([name + ".cc"]) + more_srcs,
        hdrs = native.glob([name + ".h"]),
        copts = COPTS,
        # Extensions and tests contain all they need; shared libraries would export nothing.
        linkstatic = True,
        deps = deps,
        **kwargs
    )

def smf_cc_unit(name, deps = [], test_deps = [], more_tests = [], one_thread = False, **kwargs):
    """A smf_cc_library, and a test each of <name>_test.cc, if it exists, and of `more_tests`.

    `one_thread`: the tests start no thread, so that the thread sanitizer leaves them out.
    """
    smf_cc_library(name, deps, **kwargs)
    for src in native.glob([name + "_test.cc"]) + more_tests:
        native.cc_test(
            name = src[:-len(".cc")],
            size = "small",
            timeout = "moderate",  # Sanitizers slow threads down.
            srcs = [src],
            copts = COPTS,
            tags = ["no_tsan"] if one_thread else [],
            deps = deps + test_deps + [
                ":" + name,
                "@googletest//:gtest_main",
            ],
        )

def smf_py_extension(name, deps, **kwargs):
    """The nanobind module <name>.so; deps are libraries with alwayslink."""
    native.cc_binary(
        name = name + ".so",
        linkshared = True,
        # Symbols of the static libstdc++ parts and of nanobind stay inside.
        linkopts = ["-Wl,--exclude-libs,ALL"],
        tags = ["python"],
        deps = deps,
        **kwargs
    )

def smf_py_test(src, deps, **kwargs):
    """Runs one file of pytest tests."""
    native.py_test(
        name = src[:-len(".py")],
        srcs = [src] + ["//tools:pytest_main.py"],
        main = "//tools:pytest_main.py",
        args = ["$(location %s)" % src],
        data = ["//:pyproject.toml"],
        tags = ["python"],
        deps = deps,
        **kwargs
    )
