#include "cc/cpu/ucx_library.h"

#include <dlfcn.h>

#include <cstdlib>

namespace jax_sm_free {
namespace {

Fault LoadFault(const std::string& path) {
  const char* error = dlerror();
  return {.op = "ucx",
          .expected = "the library " + path,
          .seen = error == nullptr ? "nothing" : error,
          .exchange = {}};
}

}  // namespace

Result<std::shared_ptr<const UcxLibrary>> UcxLibrary::Load(const std::string& path) {
  // Without this, UCX patches mmap and madvise of the whole process when it is loaded. It does so
  // for a cache of registered memory for NICs, which shared memory and TCP do not use.
  setenv("UCX_MEM_EVENTS", "n", 0);
  // Its symbols stay local: the process may contain another UCX.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return LoadFault(path);
  auto library = std::make_shared<UcxLibrary>();
#define SMF_UCX_RESOLVE(name)                                                      \
  library->name = reinterpret_cast<decltype(library->name)>(dlsym(handle, #name)); \
  if (library->name == nullptr) return LoadFault(path);
  SMF_UCX_FUNCTIONS(SMF_UCX_RESOLVE)
#undef SMF_UCX_RESOLVE
  return library;
}

}  // namespace jax_sm_free
