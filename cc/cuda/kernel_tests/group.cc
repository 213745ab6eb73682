#include "cc/cuda/kernel_tests/group.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace jax_sm_free::cuda::kernel_tests {
namespace {

constexpr std::byte kUnwritten{0xFF};  // NaN in every float type

template <typename T>
T* Fill(Array<T>& memory, int64_t count) {
  memory.resize(count);
  std::memset(memory.data(), 0x5A, count * sizeof(T));
  return memory.data();
}

}  // namespace

Group::Group(const Config& config) {
  for (int32_t rank = 0; rank < config.ep_size; ++rank) ranks_.push_back(MakeRank(config, rank));
  for (const auto& rank : ranks_) {
    for (size_t peer = 0; peer < ranks_.size(); ++peer) {
      rank->view.base[peer] = ranks_[peer]->region.data();
    }
  }
}

std::unique_ptr<Group::Rank> Group::MakeRank(const Config& config, int32_t number) {
  auto rank = std::make_unique<Rank>();
  RankView& view = rank->view;
  view = ViewOf(config, number);
  view.buffer_id = 7;
  view.position = number;
  view.state = rank->state.data();
  view.status = rank->status.data();
  rank->region.assign(view.regions.total, kUnwritten);
  std::fill_n(rank->region.begin(), view.regions.recv, std::byte{0});
  rank->mailbox.assign(kMailboxEntries, MailboxEntry{});
  view.mailbox = rank->mailbox.data();
  const int64_t num_local = config.num_local_experts();
  view.own_token = Fill(rank->own_token, int64_t{config.num_slots} * config.max_tokens);
  view.row_of = Fill(rank->row_of, config.max_recv_tokens());
  view.tile_counts = Fill(rank->tile_counts, (MaxTiles(config) + 1) * NumKeys(config));
  view.common_before = Fill(rank->common_before, config.max_tokens);
  view.group_row = Fill(rank->group_row, config.ep_size * num_local);
  view.group_end = Fill(rank->group_end, num_local);
  view.group_next = Fill(rank->group_next, num_local);
  view.covered = Fill(rank->covered, std::max(config.recv_capacity, config.max_recv_tokens()));
  return rank;
}

std::vector<CopyOrder> Group::TakeOrders(Rank& rank) {
  std::vector<CopyOrder> orders;
  for (;;) {
    const MailboxEntry& entry = rank.mailbox[rank.num_taken % kMailboxEntries];
    std::array<uint32_t, MailboxEntry::kWords> words;
    for (size_t i = 0; i < words.size(); ++i) {
      if (entry.words[i] >> 32 != rank.num_taken + 1) return orders;
      words[i] = static_cast<uint32_t>(entry.words[i]);
    }
    orders.push_back(std::bit_cast<CopyOrder>(words));
    ++rank.num_taken;
  }
}

void Group::Copy(const RankView& view, const CopyOrder& order) {
  const Target target = TargetOf(view, order);
  std::byte* region = view.base[target.rank];
  for (const Piece& piece : PiecesOf(view, order)) {
    std::copy_n(view.base[view.rank] + piece.source, piece.bytes,
                region + target.message + piece.begin);
  }
  std::memcpy(region + target.signal, &order.signal, sizeof(order.signal));
  ++(order.signal % kNumParts == kLastPart ? num_last_parts_ : num_first_parts_);
}

void Group::Move() {
  AwaitKernels();
  for (const auto& rank : ranks_) {
    for (const CopyOrder& order : TakeOrders(*rank)) Copy(rank->view, order);
  }
}

void Group::HoldUp() {
  AwaitKernels();
  for (const auto& rank : ranks_) TakeOrders(*rank);
}

}  // namespace jax_sm_free::cuda::kernel_tests
