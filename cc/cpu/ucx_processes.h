// Other processes of a test: the test program itself, started again.

#ifndef JAX_SM_FREE_CC_CPU_UCX_PROCESSES_H_
#define JAX_SM_FREE_CC_CPU_UCX_PROCESSES_H_

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cc/cpu/ucx_testing.h"

namespace jax_sm_free::testing {

// A process that sends each message back to where it came from, with the same number and size,
// until its standard input ends. A message numbered kMeasured it answers without a payload, and
// does not look at its bytes. Then it closes its wire and exits with status 0.
class EchoProcess {
 public:
  static constexpr uint64_t kMeasured = uint64_t{1} << 63;

  EchoProcess(int32_t self, int32_t num_peers);
  ~EchoProcess();  // kills it if it is still there
  EchoProcess(const EchoProcess&) = delete;
  EchoProcess& operator=(const EchoProcess&) = delete;

  const std::string& address() const { return address_; }
  void Connect(const std::vector<std::string>& addresses) const;
  void Signal(int signal) const;

  // Ends its standard input and waits for it. Its exit status, or minus the signal that ended it.
  int Finish();

 private:
  pid_t pid_ = -1;
  int to_ = -1;
  int from_ = -1;
  std::string address_;
};

// Process 0 is this one, the others are echoes; all connected.
struct Echoes {
  explicit Echoes(int32_t num_peers);

  Node node;
  std::vector<std::unique_ptr<EchoProcess>> processes;  // by process; the first is null
};

}  // namespace jax_sm_free::testing

#endif  // JAX_SM_FREE_CC_CPU_UCX_PROCESSES_H_
