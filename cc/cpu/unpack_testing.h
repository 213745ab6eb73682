// What the tests of unpacking share: everything that an unpack writes, in arrays that the tests
// own.

#ifndef JAX_SM_FREE_CC_CPU_UNPACK_TESTING_H_
#define JAX_SM_FREE_CC_CPU_UNPACK_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cc/config.h"
#include "cc/cpu/testing.h"
#include "cc/cpu/unpack.h"

namespace jax_sm_free::testing {

Config SmallConfig();

// Sources whose tokens all have the experts `idx`.
std::vector<Source> SameExperts(const Config& config, int64_t num_tokens,
                                const std::vector<int32_t>& idx);

// Adds the rows of `part` from `row` on to `out`; zeros where row is -1.
void Append(const std::vector<std::byte>& part, int64_t row, int64_t row_bytes,
            std::vector<std::byte>& out);

// Everything that UnpackExperts writes.
struct Experts {
  std::vector<std::byte> values = {}, scales = {};
  std::vector<int32_t> group_sizes = {}, counts = {};
  std::vector<float> weights = {};
  std::vector<int32_t> dropped = {};
  std::vector<int32_t> rows = {}, num_rows_from = {};
};

ExpertsOut OutOf(const Source& like, Experts& experts);

Experts PoisonedExperts(const Config& config, const Source& like, int poison);

// What UnpackExperts writes of everything that the sources send to `rank`, over poison.
Experts UnpackedExperts(const Config& config, const std::vector<Source>& sources, int32_t rank,
                        int poison);

// Everything that UnpackTokens writes.
struct Tokens {
  std::vector<std::byte> values = {}, scales = {};
  std::vector<int32_t> topk_idx = {};
  std::vector<float> topk_weights = {};
  std::vector<int32_t> counts = {}, num_tokens = {};
  std::vector<int32_t> rows = {}, num_rows_from = {};
};

TokensOut OutOf(const Source& like, Tokens& tokens);

Tokens PoisonedTokens(const Config& config, const Source& like, int poison);

// What `rank` receives from the sources by the contract.
Tokens ExpectedTokens(const Config& config, const std::vector<Source>& sources, int32_t rank);

}  // namespace jax_sm_free::testing

#endif  // JAX_SM_FREE_CC_CPU_UNPACK_TESTING_H_
