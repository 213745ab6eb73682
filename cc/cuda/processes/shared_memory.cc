#include "cc/cuda/processes/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "cc/cuda/host/refusal.h"

namespace jax_sm_free::cuda {
namespace {

Fault Failed(const char* call, const std::string& name, int error) {
  return Refuse(std::string(call) + " of shared memory " + name + " to succeed",
                std::strerror(error));
}

}  // namespace

std::string MemoryHost() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  struct stat shm {};
  (void)stat("/dev/shm", &shm);  // where shm_open keeps its files
  return boot + "/" + std::to_string(shm.st_dev);
}

Result<std::shared_ptr<SharedMemory>> SharedMemory::Map(const std::string& name, size_t bytes,
                                                        bool create) {
  const int fd = shm_open(name.c_str(), O_RDWR | (create ? O_CREAT | O_EXCL : 0), 0600);
  if (fd < 0) return Failed("shm_open", name, errno);
  const char* call = "ftruncate";
  void* data = MAP_FAILED;
  if (!create || ftruncate(fd, static_cast<off_t>(bytes)) == 0) {
    call = "mmap";
    data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  const int error = errno;
  close(fd);
  if (data == MAP_FAILED) {
    if (create) shm_unlink(name.c_str());
    return Failed(call, name, error);
  }
  return std::shared_ptr<SharedMemory>(new SharedMemory(name, bytes, data, create));
}

Result<std::shared_ptr<SharedMemory>> SharedMemory::Create(const std::string& name, size_t bytes) {
  return Map(name, bytes, true);
}

Result<std::shared_ptr<SharedMemory>> SharedMemory::Open(const std::string& name, size_t bytes) {
  return Map(name, bytes, false);
}

void SharedMemory::Unname() {
  if (std::exchange(is_named_, false)) shm_unlink(name_.c_str());
}

SharedMemory::~SharedMemory() {
  Unname();
  munmap(data_, bytes_);
}

}  // namespace jax_sm_free::cuda
