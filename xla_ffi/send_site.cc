#include "xla_ffi/send_site.h"

#include <atomic>
#include <string>
#include <string_view>

#include "cc/runtime.h"

namespace jax_sm_free {
namespace {

namespace ffi = xla::ffi;

// jax_sm_free/call_names.py describes the attributes.
ffi::ErrorOr<std::unique_ptr<SendSite>> MakeSendSite(ffi::Dictionary attributes) {
  const auto buffer = attributes.get<std::string_view>("buffer");
  if (buffer.has_error()) return ffi::Unexpected(buffer.error());
  auto site = std::make_unique<SendSite>();
  site->buffer = *buffer;
  site->keeper = Registry::Get().Keep(*buffer);
  if (!attributes.contains("program")) return site;
  const auto program = attributes.get<std::string_view>("program");
  const auto lowering = attributes.get<int64_t>("lowering");
  const auto call_number = attributes.get<int64_t>("call_number");
  const auto call = attributes.get<std::string_view>("call");
  if (program.has_error()) return ffi::Unexpected(program.error());
  if (lowering.has_error()) return ffi::Unexpected(lowering.error());
  if (call_number.has_error()) return ffi::Unexpected(call_number.error());
  if (call.has_error()) return ffi::Unexpected(call.error());
  site->copy = CallSites::Get().Add(site->buffer, std::string(*program), *lowering, *call_number,
                                    std::string(*call));
  return site;
}

XLA_FFI_DEFINE_HANDLER(kMakeSendSite, MakeSendSite,
                       ffi::Ffi::BindInstantiate().Attrs<ffi::Dictionary>());

}  // namespace

ffi::TypeId SendSite::id = {};

int64_t SendSite::Next() {
  static std::atomic<int64_t> next{0};
  return next++;
}

XLA_FFI_Handler* MakeSendSiteHandler() { return kMakeSendSite; }

XLA_FFI_TypeId* CallSiteTypeId() { return &SendSite::id; }

const XLA_FFI_TypeInfo* CallSiteTypeInfo() {
  static const XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<SendSite>();
  return &info;
}

}  // namespace jax_sm_free
