// What a decode step reads of the pools, in which order, and how it is asked for ahead.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "lanes.h"
#include "paged.h"

namespace splitserve {

constexpr int64_t kTileBytes = 128 << 10;  // of K: it and as much of V, and what is asked for ahead, in an L2 of a megabyte

// The KV heads [head, head + heads) of one query token: worked on together, as a block holds their runs one after another and
// long runs come from memory faster than short ones.
struct Span {
  int64_t row, head, heads;
  int64_t position;     // of the query
  int64_t seen, begin;  // the first key with weight, and the first of its sixteen
  const int64_t* blocks;

  Span(const Step& s, int64_t index, int64_t end)
      : row(index / s.kv_heads),
        head(index % s.kv_heads),
        heads(std::min(s.kv_heads - head, end - index)),
        position(s.kv_len[row] - 1),
        seen(s.first_seen(position)),
        begin(seen / kLanes * kLanes),
        blocks(s.blocks(row)) {}
};

// Keys [from, to) of a span, up to the end of a block. How many blocks are a tile depends on the model alone: its borders round
// sums, and an answer may depend neither on the rows beside it nor on how many threads share its heads.
struct KeyTile {
  int64_t from, to;

  KeyTile(const Step& s, const Span& span, int64_t from)
      : from(from), to(std::min(span.position + 1, (from / s.block_tokens + blocks(s)) * s.block_tokens)) {}
  int64_t padded() const { return (to - from + kLanes - 1) / kLanes * kLanes; }
  static int64_t blocks(const Step& s) {
    const int64_t bytes = s.kv_heads * s.block_tokens * s.k.dim * static_cast<int64_t>(sizeof(bf16));
    return std::max<int64_t>(1, kTileBytes / bytes);
  }
};

// Asks for the lines of K and V in the order in which the tiles of [index, end) are read, a tile of K ahead of the work: the
// hardware finds no order in a block table. At the pace of the work and few lines at once: a core drops what it is asked for while
// it waits for as many as it can (one of an AMD EPYC, 30 layers of eight rows at a context of 1,056: asked for as fast as each
// tile's work allowed 14 GB/s, at one pace 20; nothing is dropped below 19).
class Ahead {
 public:
  Ahead(const Step& s, int64_t index, int64_t end) : s_(s), end_(end), span_(s, index, end), tile_(s, span_, span_.begin) {
    const int64_t lines = (s.k.dim + s.v.dim) / 2;  // of sixteen tokens of a KV head
    per_score_ = lines * kScoring / s.group;
    per_weight_ = lines * (kLine - kScoring) / (kLanes * s.group * (s.v.dim / 32));
  }
  // Before the scores of each tile, in their order: its K is read now, so asking goes on from its V at least. A block that is read
  // in part is asked for whole, which leaves the asking behind the work.
  void reading(const Span& span, const KeyTile& tile) {
    if (asked_ < read_ || (asked_ == read_ && !in_v_)) {
      asked_ = read_;
      span_ = span;
      tile_ = tile;
      enter(true);
    }
    read_++;
  }
  // Query heads that are asked for together.
  int64_t heads() const { return std::max<int64_t>(1, kAtOnce * kLine / per_score_); }
  // Before this many query heads meet sixteen keys.
  void scores(int64_t heads) { ask(per_score_ * heads); }
  // Before this many runs of 32 elements of V, one of a token, meet this many weights each.
  void weighs(int64_t runs, int64_t heads) { ask(per_weight_ * runs * heads); }

 private:
  static constexpr int64_t kLine = 1 << 16;             // what is owed is counted in parts of a line
  static constexpr int64_t kScoring = kLine * 11 / 16;  // scores' part of a tile's time (heads of 64 to 256 dims, groups of 3 to 8)
  static constexpr int64_t kAtOnce = 40;                // lines

  void ask(int64_t parts) {
    owed_ += parts;
    int64_t count = owed_ / kLine;
    owed_ %= kLine;
    while (count > 0 && next_) {
      const char* line = next_;
      const int64_t some = std::min(count, (stop_ - line) / 64);
      for (int64_t i = 0; i < some; i++, line += 64) _mm_prefetch(line, _MM_HINT_T1);
      count -= some;
      next_ = line;
      if (line == stop_) advance();
    }
  }
  void advance() {
    if (++block_ <= (tile_.to - 1) / s_.block_tokens)
      enter_block();
    else if (!in_v_)
      enter(true);
    else
      enter_tile();
  }
  void enter_tile() {
    asked_++;
    const int64_t after = span_.row * s_.kv_heads + span_.head + span_.heads;
    if (tile_.to <= span_.position) {
      tile_ = KeyTile(s_, span_, tile_.to);
    } else if (after < end_) {
      span_ = Span(s_, after, end_);
      tile_ = KeyTile(s_, span_, span_.begin);
    } else {
      next_ = nullptr;
      return;
    }
    enter(false);
  }
  void enter(bool v) {
    in_v_ = v;
    block_ = tile_.from / s_.block_tokens;
    enter_block();
  }
  void enter_block() {
    const Pool& pool = in_v_ ? s_.v : s_.k;
    next_ = reinterpret_cast<const char*>(pool.at(span_.blocks[block_], span_.head));
    stop_ = next_ + span_.heads * pool.head_stride * static_cast<int64_t>(sizeof(bf16));
  }
  const Step& s_;
  const int64_t end_;
  int64_t read_ = 0, asked_ = -1;  // the next tile to read, and the one that is asked for
  Span span_;                      // of the latter
  KeyTile tile_;
  bool in_v_ = false;
  int64_t block_ = 0;
  int64_t per_score_, per_weight_, owed_ = 0;     // in parts of a line
  const char *next_ = nullptr, *stop_ = nullptr;  // of a run of K or V; null: all were asked for
};

}  // namespace splitserve
