// Who sees whom, as tiles of rows and ranges of keys: index arithmetic only, for the GPU and for the host alike.
//
// Compile: included by two_stream_attention.cuh; also plain C++17. Uses no shared memory.
//
// Keys lie in the order M, A, B. A row of shift s sees one window of keys p (kernels/visibility.py):
//
//     s <= p < window + s        (0 <= p < window + s without mask tokens)
//
// where `window` counts the keys that a row with s = 0 sees: N, or c without mask tokens. A row tile has ROWS rows:
//
//     first tiles     rows with s = 0: A, then M
//     target tiles    targets [start, start + ROWS / 2): B_i in the first half (s = i + 1), G_i in the second (s = i);
//                     in the last block, which has no content queries, G_i alone for ROWS targets
//
// With one cut per image `real` targets exist out of `targets`; the rest is padding, with results 0.
#pragma once

#if defined(__CUDACC__)
#define MAPET_HD __host__ __device__ __forceinline__
#else
#define MAPET_HD inline
#endif

namespace mapet {

using Index = long long;

constexpr int ROWS = 16;  // rows of a row tile, and keys of a key tile of the backward pass: one matrix product's side

MAPET_HD int smaller(int a, int b) { return a < b ? a : b; }
MAPET_HD int larger(int a, int b) { return a > b ? a : b; }

// An index read from memory, which may be any number: itself where it is in [0, count), else some other one in there.
// One instruction, as kernels do it for every row.
MAPET_HD int index_below(Index x, int count) {
  const unsigned index = static_cast<unsigned>(x), last = count - 1;
  return static_cast<int>(index < last ? index : last);
}
MAPET_HD int tiles_of(int count, int tile) { return (count + tile - 1) / tile; }

// Sizes of one image's problem.
struct Image {
  int tokens, targets, cut;  // N, T (rows kept for targets), c
  bool mask_tokens, with_content;

  MAPET_HD int real() const { return tokens - cut; }                           // targets that exist
  MAPET_HD int masks() const { return mask_tokens ? real() : 0; }              // keys M
  MAPET_HD int window() const { return masks() + cut; }                        // keys seen by a row with s = 0
  MAPET_HD int keys() const { return masks() + tokens; }                       // keys that exist
  MAPET_HD int content_rows() const { return tokens + (mask_tokens ? targets : 0); }  // padding included
  MAPET_HD int tile_targets() const { return with_content ? ROWS / 2 : ROWS; }
};

// The row tiles of a launch come in one list: first tiles, then target tiles. Cuts on the device are not known to the
// host, so the list is the longest that any cut asks for.
MAPET_HD int first_tiles(const Image& image, bool cut_known) {
  if (!image.with_content) return 0;
  return tiles_of(image.mask_tokens || !cut_known ? image.tokens : image.cut, ROWS);
}

MAPET_HD int target_tiles(const Image& image) { return tiles_of(image.targets, image.tile_targets()); }

struct RowTile {
  bool is_first;
  int start;  // first row among those with s = 0, or first target
};

MAPET_HD RowTile row_tile(const Image& image, int first_tiles, int index) {
  if (index < first_tiles) return {true, index * ROWS};
  return {false, (index - first_tiles) * image.tile_targets()};
}

struct Row {
  int row;        // in its stream's memory, before a permutation
  bool is_query;  // which stream
  int shift;
  bool sees;    // it takes part
  bool exists;  // it has memory; if it does not see, its results are 0
};

MAPET_HD Row row_of(const Image& image, RowTile tile, int r) {
  const int real = image.real();
  if (tile.is_first) {
    const int first = tile.start + r;
    const bool exists = first < image.window();
    return {first < image.cut ? first : image.tokens + first - image.cut, false, 0, exists, exists};
  }
  const int target = tile.start + r % image.tile_targets();
  if (!image.with_content || r >= ROWS / 2) return {target, true, target, target < real, target < image.targets};
  // A padding mask token stands in for the content of a target that does not exist, so that someone writes it.
  const int row = target < real ? image.cut + target : image.tokens + target;
  return {row, false, target + 1, target < real, target < (image.mask_tokens ? image.targets : real)};
}

// Where a row has its statistics in the workspace (images, heads, N + 2 T): first rows, then B, then G.
MAPET_HD int statistic_offset(const Image& image, RowTile tile, int r) {
  if (tile.is_first) return tile.start + r;
  const bool is_query = !image.with_content || r >= ROWS / 2;
  return image.tokens + (is_query ? image.targets : 0) + tile.start + r % image.tile_targets();
}

// Keys [lo, hi) are seen by some row of a tile, keys [full_lo, full_hi) by all that see.
struct KeyRange {
  int lo, hi, full_lo, full_hi;

  MAPET_HD bool meets(int p0) const { return p0 < hi && p0 + ROWS > lo; }  // does a row see any of ROWS keys from p0?
};

MAPET_HD KeyRange keys_of_tile(const Image& image, RowTile tile) {
  const int window = image.window();
  if (tile.is_first) {
    const bool some = tile.start < window;
    return {0, some ? window : 0, 0, some ? window : 0};
  }
  const int start = tile.start, stop = smaller(start + image.tile_targets(), image.real());
  if (stop <= start) return {0, 0, 0, 0};
  if (image.mask_tokens) return {start, window + stop, stop, window + start};
  return {0, window + stop, 0, window + start};
}

MAPET_HD bool visible(const Image& image, int p, int shift) {
  return p < image.window() + shift && (p >= shift || !image.mask_tokens);
}

// Memory row of the key at position p of the order M, A, B, padding; before a permutation.
MAPET_HD int key_row(const Image& image, int p) {
  if (p < image.masks()) return image.tokens + p;
  return p < image.keys() ? p - image.masks() : p;
}

// Row tiles that see some of the keys [p0, p1), as two ranges [first_lo, first_hi) and [target_lo, target_hi) of
// tiles of each kind.
struct TileRanges {
  int first_count, target_lo, target_hi;

  MAPET_HD int count() const { return first_count + target_hi - target_lo; }
};

MAPET_HD TileRanges tiles_of_keys(const Image& image, int p0, int p1) {
  const int window = image.window(), size = image.tile_targets();
  const int first = image.with_content && p0 < window ? tiles_of(window, ROWS) : 0;
  const int lo = larger(p0 - window, 0);
  const int hi = image.mask_tokens ? smaller(p1, image.real()) : image.real();
  if (hi <= lo) return {first, 0, 0};
  return {first, lo / size, tiles_of(hi, size)};
}

MAPET_HD RowTile nth_tile(const Image& image, const TileRanges& ranges, int n) {
  if (n < ranges.first_count) return {true, n * ROWS};
  return {false, (ranges.target_lo + n - ranges.first_count) * image.tile_targets()};
}

}  // namespace mapet
