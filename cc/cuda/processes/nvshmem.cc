#include "cc/cuda/processes/nvshmem.h"

#include <bootstrap_device_host/nvshmem_uniqueid.h>
#include <dlfcn.h>
#include <nvshmem_host.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "cc/cuda/host/refusal.h"

namespace jax_sm_free::cuda {

#define SMF_NVSHMEM_FUNCTIONS(apply) \
  apply(nvshmem_fence);              \
  apply(nvshmem_free);               \
  apply(nvshmem_malloc);             \
  apply(nvshmem_my_pe);              \
  apply(nvshmem_n_pes);              \
  apply(nvshmem_ptr);                \
  apply(nvshmem_putmem);             \
  apply(nvshmem_putmem_nbi);         \
  apply(nvshmem_uint64_p);           \
  apply(nvshmemx_buffer_register);   \
  apply(nvshmemx_buffer_unregister); \
  apply(nvshmemx_get_uniqueid);      \
  apply(nvshmemx_hostlib_init_attr); \
  apply(nvshmemx_init_status);       \
  apply(nvshmemx_set_attr_uniqueid_args);

struct Nvshmem::Functions {
// NOLINTNEXTLINE(bugprone-macro-parentheses): a declaration has its name without parentheses.
#define SMF_DECLARE(name) decltype(&::name) name = nullptr
  SMF_NVSHMEM_FUNCTIONS(SMF_DECLARE)
#undef SMF_DECLARE
};

namespace {

Fault CallFailed(const char* call, int code) {
  return Refuse(std::string(call) + " to return 0",
                std::to_string(code) + "; NVSHMEM_DEBUG=WARN in the environment may tell more");
}

Fault LoadFailed(const std::string& path) {
  const char* error = dlerror();
  return Refuse("the library " + path, error == nullptr ? "nothing" : error);
}

// The library reads these variables when this process makes an id, or joins.
void SetEnvironment() {
  // NVLink multicast serves the collectives of NVSHMEM, which we do not call, and takes memory.
  setenv("NVSHMEM_DISABLE_NVLS", "1", 1);
  // Where there is no NIC, a thread would serve kernels that call NVSHMEM. None of our kernels
  // does.
  setenv("NVSHMEM_DISABLE_LOCAL_ONLY_PROXY", "1", 0);
}

}  // namespace

Result<Nvshmem*> Nvshmem::Load(const std::string& path) {
  static std::mutex mutex;
  static Nvshmem* loaded = nullptr;
  const std::lock_guard lock(mutex);
  if (loaded != nullptr) return loaded;
  SetEnvironment();
  // A library that has loaded the same file before shares it with us, initialized or not.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return LoadFailed(path);
  auto functions = std::make_unique<Functions>();
#define SMF_RESOLVE(name)                                                              \
  functions->name = reinterpret_cast<decltype(functions->name)>(dlsym(handle, #name)); \
  if (functions->name == nullptr) return LoadFailed(path)
  SMF_NVSHMEM_FUNCTIONS(SMF_RESOLVE)
#undef SMF_RESOLVE
  loaded = new Nvshmem(std::move(functions));
  return loaded;
}

Nvshmem::Nvshmem(std::unique_ptr<const Functions> functions) : functions_(std::move(functions)) {}

bool Nvshmem::IsJoined() const {
  const int status = functions_->nvshmemx_init_status();
  return status != NVSHMEM_STATUS_NOT_INITIALIZED && status != NVSHMEM_STATUS_IS_BOOTSTRAPPED;
}

int Nvshmem::Pe() const { return functions_->nvshmem_my_pe(); }

int Nvshmem::NumPes() const { return functions_->nvshmem_n_pes(); }

Result<std::string> Nvshmem::MakeId() {
  const std::lock_guard lock(mutex_);
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  if (const int code = functions_->nvshmemx_get_uniqueid(&id); code != 0) {
    return CallFailed("nvshmemx_get_uniqueid", code);
  }
  return std::string(reinterpret_cast<const char*>(&id), sizeof(id));
}

std::optional<Fault> Nvshmem::Join(const std::string& id, int pe, int num_pes) {
  const std::lock_guard lock(mutex_);
  nvshmemx_uniqueid_t unique_id = NVSHMEMX_UNIQUEID_INITIALIZER;
  if (id.size() != sizeof(unique_id)) {
    return Refuse("an id of NVSHMEM of " + std::to_string(sizeof(unique_id)) + " bytes",
                  std::to_string(id.size()));
  }
  std::memcpy(&unique_id, id.data(), sizeof(unique_id));
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  int code = functions_->nvshmemx_set_attr_uniqueid_args(pe, num_pes, &unique_id, &attributes);
  if (code != 0) return CallFailed("nvshmemx_set_attr_uniqueid_args", code);
  code = functions_->nvshmemx_hostlib_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
  if (code != 0) return CallFailed("nvshmemx_hostlib_init_attr", code);
  // NVSHMEM also returns 0 if it found the other processes and then could not set up the device.
  if (!IsJoined()) {
    return Refuse("nvshmemx_init_status 2 (initialized)",
                  std::to_string(functions_->nvshmemx_init_status()) +
                      "; NVSHMEM_DEBUG=WARN in the environment may tell more");
  }
  return std::nullopt;
}

void* Nvshmem::Allocate(size_t bytes) {
  const std::lock_guard lock(mutex_);
  return functions_->nvshmem_malloc(bytes);
}

void Nvshmem::Free(void* memory) {
  const std::lock_guard lock(mutex_);
  functions_->nvshmem_free(memory);
}

std::byte* Nvshmem::PointerAt(void* memory, int pe) const {
  return static_cast<std::byte*>(functions_->nvshmem_ptr(memory, pe));
}

std::optional<Fault> Nvshmem::Register(void* memory, size_t bytes) {
  const std::lock_guard lock(mutex_);
  const int code = functions_->nvshmemx_buffer_register(memory, bytes);
  if (code != 0) return CallFailed("nvshmemx_buffer_register", code);
  return std::nullopt;
}

void Nvshmem::Unregister(void* memory) {
  const std::lock_guard lock(mutex_);
  (void)functions_->nvshmemx_buffer_unregister(memory);
}

void Nvshmem::Put(void* target, const void* source, size_t bytes, int pe) {
  const std::lock_guard lock(mutex_);
  functions_->nvshmem_putmem_nbi(target, source, bytes, pe);
}

void Nvshmem::PutAndWait(void* target, const void* source, size_t bytes, int pe) {
  const std::lock_guard lock(mutex_);
  functions_->nvshmem_putmem(target, source, bytes, pe);
}

void Nvshmem::PutSignal(void* target, uint64_t value, int pe) {
  const std::lock_guard lock(mutex_);
  functions_->nvshmem_fence();
  functions_->nvshmem_uint64_p(static_cast<uint64_t*>(target), value, pe);
}

}  // namespace jax_sm_free::cuda
