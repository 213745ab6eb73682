#include "cc/op_table.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "cc/token.h"
#include "gtest/gtest.h"

namespace jax_sm_free {
namespace {

using enum Content;

// All sizes differ, so that no array fits in the place of another.
constexpr Config kConfig{.ep_size = 4,
                         .num_experts = 12,
                         .top_k = 5,
                         .max_tokens = 7,
                         .recv_capacity = 40,
                         .row_bytes = 32,
                         .num_nodes = 2,
                         .node_stride = 2};
constexpr int64_t kNumTokens = 6;
constexpr int64_t kNumColumns = 16;  // of two bytes: as wide as rows may be

int64_t SizeOf(Dim dim) {
  switch (dim) {
    case Dim::kTopK:
    case Dim::kFanout:
      return kConfig.top_k;
    case Dim::kRanks:
      return kConfig.ep_size;
    case Dim::kLocalExperts:
      return kConfig.num_local_experts();
    case Dim::kRecvCapacity:
    case Dim::kExpertRows:
    case Dim::kWeighted:
      return kConfig.recv_capacity;
    case Dim::kMaxRecvTokens:
      return kConfig.max_recv_tokens();
    case Dim::kMaxRailTokens:
      return int64_t{kConfig.num_nodes} * kConfig.max_tokens;
    case Dim::kOne:
      return 1;
    case Dim::kTokenWords:
      return kTokenSize;
    case Dim::kTokens:
      return kNumTokens;
    case Dim::kColumns:
    case Dim::kValueColumns:
      return kNumColumns;
    case Dim::kScaleColumns:
    case Dim::kNumDims:
      return 0;
  }
  return 0;
}

bool IsOfTheBuffer(Dim dim) { return dim <= Dim::kTokenWords; }

// A call of an op, whose arrays are all as they should be until a test changes one.
class Call {
 public:
  explicit Call(const OpTable& table) : table_(table) {
    for (const Operand& operand : table.arrays) {
      Array& array = arrays_.emplace_back();
      for (int32_t i = 0; i < operand.rank; ++i) array.dims.push_back(SizeOf(operand.dims[i]));
      const bool has_rows = operand.content == kSummed || operand.content == kValues;
      array.dtype = has_rows ? DType::kBFloat16 : DType::kFloat32;
    }
  }

  struct Array {
    std::vector<int64_t> dims = {};
    std::optional<DType> dtype = {};
  };
  Array& at(size_t i) { return arrays_[i]; }

  // Sets the size of a dimension in all arrays. Returns whether any array has it.
  bool SetAll(Dim dim, int64_t size) {
    bool has = false;
    for (size_t i = 0; i < arrays_.size(); ++i) {
      for (int32_t d = 0; d < table_.arrays[i].rank; ++d) {
        if (table_.arrays[i].dims[d] != dim) continue;
        arrays_[i].dims[d] = size;
        has = true;
      }
    }
    return has;
  }

  // The error, without what all errors of the op begin with; "" for none.
  std::string Error(const Config& config = kConfig) const {
    std::vector<Given> given;
    for (const Array& array : arrays_) {
      int64_t row_bytes = array.dtype ? ElementBytes(*array.dtype) : 1;
      for (size_t d = 1; d < array.dims.size(); ++d) row_bytes *= array.dims[d];
      given.push_back({array.dims, array.dtype, row_bytes});
    }
    const std::optional<std::string> error = CheckOperands(table_, config, given);
    if (!error) return "";
    const std::string begin = std::string("jax_sm_free: ") + OpName(table_.op) + ": expected ";
    EXPECT_EQ(error->substr(0, begin.size()), begin);
    return error->substr(begin.size());
  }

 private:
  const OpTable& table_;
  std::vector<Array> arrays_;
};

// The names of all arrays with such a dimension.
std::vector<std::string> NamesWith(const OpTable& table, Dim dim) {
  std::vector<std::string> names;
  for (const Operand& operand : table.arrays) {
    const auto* end = operand.dims.begin() + operand.rank;
    if (std::find(operand.dims.begin(), end, dim) != end) names.emplace_back(operand.name);
  }
  return names;
}

// The name that an error begins with, which says "<name> of ...".
std::string NameIn(const std::string& error) { return error.substr(0, error.find(" of ")); }

class OpTableTest : public testing::TestWithParam<const OpTable*> {
 protected:
  const OpTable& table = *GetParam();

  // The first array of that content; the number of arrays if there is none.
  size_t First(Content content) const {
    size_t i = 0;
    while (i < table.arrays.size() && table.arrays[i].content != content) ++i;
    return i;
  }
};

TEST_P(OpTableTest, TakesGoodOperands) { EXPECT_EQ(Call(table).Error(), ""); }

TEST_P(OpTableTest, TakesAllSizesThatACallMayChoose) {
  for (const int64_t num_tokens : {0, 1, kConfig.max_tokens}) {
    Call call(table);
    call.SetAll(Dim::kTokens, num_tokens);
    EXPECT_EQ(call.Error(), "");
  }
  Call by_tokens(table);
  by_tokens.SetAll(Dim::kExpertRows, kConfig.max_recv_tokens());
  by_tokens.SetAll(Dim::kWeighted, kConfig.max_recv_tokens());
  by_tokens.SetAll(Dim::kFanout, 1);
  EXPECT_EQ(by_tokens.Error(), "");
  Call without_weights(table);
  without_weights.SetAll(Dim::kWeighted, 0);
  EXPECT_EQ(without_weights.Error(), "");
}

TEST_P(OpTableTest, RefusesAnotherSizeOfAnyDimension) {
  for (size_t i = 0; i < table.arrays.size(); ++i) {
    const Operand& operand = table.arrays[i];
    for (int32_t d = 0; d < operand.rank; ++d) {
      const Dim dim = operand.dims[d];
      const std::vector<std::string> names = NamesWith(table, dim);
      const bool is_limited =
          dim == Dim::kExpertRows || dim == Dim::kWeighted || dim == Dim::kFanout;
      if (!IsOfTheBuffer(dim) && !is_limited && names.size() == 1) continue;  // any size is right
      Call call(table);
      ++call.at(i).dims[d];
      const std::string error = call.Error();
      if (IsOfTheBuffer(dim)) {
        EXPECT_EQ(NameIn(error), operand.name) << error;
      } else {  // the array and another one with this dimension differ
        EXPECT_NE(std::find(names.begin(), names.end(), NameIn(error)), names.end())
            << operand.name << ": " << error;
      }
    }
  }
}

TEST_P(OpTableTest, RefusesAnotherRankOfAnyArray) {
  for (size_t i = 0; i < table.arrays.size(); ++i) {
    Call more(table);
    more.at(i).dims.push_back(1);
    EXPECT_EQ(NameIn(more.Error()), table.arrays[i].name);
    if (table.arrays[i].rank == 0) continue;
    Call fewer(table);
    fewer.at(i).dims.pop_back();
    EXPECT_EQ(NameIn(fewer.Error()), table.arrays[i].name);
  }
}

TEST_P(OpTableTest, AnErrorSaysBothShapes) {
  Call call(table);
  const size_t token = static_cast<size_t>(
      std::find_if(table.arrays.begin(), table.arrays.end(),
                   [](const Operand& operand) { return operand.name == std::string("token"); }) -
      table.arrays.begin());
  call.at(token).dims = {9};
  EXPECT_EQ(call.Error(), "token of shape [8], seen [9]");
}

TEST_P(OpTableTest, RefusesTooManyTokens) {
  Call call(table);
  if (!call.SetAll(Dim::kTokens, 8)) return;  // no array of tokens
  EXPECT_EQ(call.Error(), "at most 7 tokens, seen 8");
}

TEST_P(OpTableTest, RefusesRowsThatAreNeitherOfExpertsNorOfTokens) {
  Call call(table);
  if (!call.SetAll(Dim::kExpertRows, 39)) return;  // no array of expert rows
  call.SetAll(Dim::kWeighted, 39);
  EXPECT_EQ(call.Error(), NamesWith(table, Dim::kExpertRows)[0] + " of 40 or 28 rows, seen 39");
}

TEST_P(OpTableTest, RefusesWeightsOfAnotherLength) {
  Call call(table);
  if (!call.SetAll(Dim::kWeighted, 39)) return;  // no weights
  EXPECT_EQ(call.Error(), NamesWith(table, Dim::kWeighted)[0] + " of 40 or 0 rows, seen 39");
}

TEST_P(OpTableTest, RefusesAFanoutOfTwo) {
  Call call(table);
  if (!call.SetAll(Dim::kFanout, 2)) return;  // no fanout
  EXPECT_EQ(call.Error(), "layout.rows of 1 or 5 columns, seen 2");
}

TEST(DispatchRecvTokensTest, ALayoutByTokensHasOneColumn) {
  Call call(kDispatchRecvTokensTable);
  ASSERT_TRUE(call.SetAll(Dim::kOne, kConfig.top_k));
  EXPECT_EQ(call.Error(), "layout.rows of shape [28, 1], seen [28, 5]");
}

TEST_P(OpTableTest, RefusesSumsOfAnotherDtype) {
  const size_t first = First(kSummed);
  for (size_t i = first; i < table.arrays.size(); ++i) {
    if (table.arrays[i].content != kSummed) continue;
    const std::string name = table.arrays[i].name;
    Call unknown(table);
    unknown.at(i).dtype = std::nullopt;
    EXPECT_EQ(unknown.Error(), name + " of float32, bfloat16 or float16, seen another dtype");
    if (i == first) continue;
    Call other(table);
    other.at(i).dtype = DType::kFloat16;
    EXPECT_EQ(other.Error(),
              name + " of the dtype of " + table.arrays[first].name + ", seen another");
  }
}

TEST_P(OpTableTest, RefusesRowsThatAreTooWide) {
  Call call(table);
  if (call.SetAll(Dim::kColumns, kNumColumns + 1) |
      call.SetAll(Dim::kValueColumns, kNumColumns + 1)) {
    EXPECT_EQ(call.Error(), "rows of at most 32 bytes, seen 34");
  }
  Call with_scales(table);
  if (with_scales.SetAll(Dim::kScaleColumns, 1)) {
    EXPECT_EQ(with_scales.Error(), "rows of at most 32 bytes, seen 36");
    with_scales.SetAll(Dim::kValueColumns, 14);
    EXPECT_EQ(with_scales.Error(), "");
  }
}

std::string NameOfTable(const testing::TestParamInfo<const OpTable*>& info) {
  std::string name = OpName(info.param->op);
  if (info.param == &kDispatchRecvTokensTable) name += "_tokens";
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, OpTableTest,
                         testing::Values(&kDispatchSendTable, &kDispatchRecvTable,
                                         &kDispatchRecvTokensTable, &kCombineSendTable,
                                         &kCombineRecvTable, &kCombineBackwardSendTable,
                                         &kCombineBackwardRecvTable, &kDispatchBackwardSendTable,
                                         &kDispatchBackwardRecvTable, &kDispatchForwardTable,
                                         &kCombineForwardTable, &kCombineBackwardForwardTable,
                                         &kDispatchBackwardForwardTable),
                         NameOfTable);

// The rows that a dispatch moves.
class MovedRowsTest : public OpTableTest {
 protected:
  static Config QuantizingConfig() {
    Config config = kConfig;
    config.wire_format = WireFormat::kFloat8Block128;
    return config;
  }
};

TEST_P(MovedRowsTest, MayHaveAnyDtypeInAPlainFormat) {
  Call call(table);
  for (size_t i = 0; i < table.arrays.size(); ++i) {
    if (table.arrays[i].content == kValues) call.at(i).dtype = std::nullopt;
  }
  EXPECT_EQ(call.Error(), "");
}

TEST_P(MovedRowsTest, HaveOneDtype) {
  for (const Content content : {kValues, kScales}) {
    const size_t first = First(content);
    for (size_t i = first + 1; i < table.arrays.size(); ++i) {
      if (table.arrays[i].content != content) continue;
      Call call(table);
      call.SetAll(Dim::kValueColumns, 4);
      call.SetAll(Dim::kScaleColumns, 1);
      EXPECT_EQ(call.Error(), "");
      call.at(i).dtype = std::nullopt;  // one byte
      const std::string first_name = table.arrays[first].name;
      EXPECT_EQ(call.Error(),
                table.arrays[i].name + (" of the dtype of " + first_name) + ", seen another");
    }
  }
}

TEST_P(MovedRowsTest, MayBeAsWideAsTheyTravelOnAQuantisingWire) {
  Call call(table);
  for (size_t i = 0; i < table.arrays.size(); ++i) {
    if (table.arrays[i].content == kValues) call.at(i).dtype = DType::kFloat32;
  }
  EXPECT_EQ(call.Error(), "rows of at most 32 bytes, seen 64");
  EXPECT_EQ(call.Error(QuantizingConfig()), "");  // 16 values and one scale
  call.SetAll(Dim::kValueColumns, 29);
  EXPECT_EQ(call.Error(QuantizingConfig()), "rows of at most 32 bytes, seen 33");
}

TEST_P(MovedRowsTest, HaveNoScalesOnAQuantisingWire) {
  Call call(table);
  call.SetAll(Dim::kScaleColumns, 1);
  EXPECT_EQ(call.Error(QuantizingConfig()), "no scales where the wire quantises, seen some");
}

TEST_P(MovedRowsTest, HaveElementsOnAQuantisingWire) {
  Call call(table);
  const size_t first = First(kValues);
  call.at(first).dtype = std::nullopt;
  EXPECT_EQ(call.Error(QuantizingConfig()),
            table.arrays[first].name +
                std::string(" of float32, bfloat16 or float16, seen another dtype"));
}

INSTANTIATE_TEST_SUITE_P(All, MovedRowsTest,
                         testing::Values(&kDispatchSendTable, &kDispatchRecvTable,
                                         &kDispatchRecvTokensTable),
                         NameOfTable);

TEST(OpTableTest, AForwardNeedsSeveralNodes) {
  Config one_node = kConfig;
  one_node.num_nodes = 1;
  EXPECT_EQ(Call(kDispatchForwardTable).Error(one_node),
            "a buffer of several nodes, seen one of a single node");
  EXPECT_EQ(Call(kCombineForwardTable).Error(), "");
}

}  // namespace
}  // namespace jax_sm_free
