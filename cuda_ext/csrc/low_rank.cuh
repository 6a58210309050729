// out = in + scale * left . right for a matrix of large `in` and a small inner dimension, the rank.
//
// LoRA's two kernels are this: the expansion beside a linear layer (in = out = y, left = x A^T, right = B^T) and the
// rebuild of a weight (in = golden, left = B, right = A). Reading `in` and writing `out` is the work, so a block keeps
// its tile of `right` in shared memory, walks down the rows and loads the next rows of `in` before it finishes these.
// Products are summed over the rank in one fixed order in float32 and rounded once.
#pragma once

#include "vector.cuh"

namespace ember {

constexpr int kLowRankThreads = 128;
constexpr int kMaxRank = 256;

template <class T>
struct LowRank {
  const T* in;
  T* out;
  int64_t in_stride, out_stride;
  const T* left;  // [rows, rank]
  int64_t left_stride;
  const T* right;  // [rank, columns], or [columns, rank]
  int64_t right_stride;
  int64_t rows, columns;
  int rank;  // 0: out = in, to the bit
  float scale;
  bool right_whole;  // rows of right are whole 16-byte pieces
  bool left_pairs;   // rows of left are whole pairs of elements
};

// One projection of a fused layer as cuda_ext/lora.py hands it over.
struct LoraPart {
  const void* b;  // [rows, rank]
  int64_t first_row, rows, first_rank, rank;
  double scale;
};
constexpr int kMaxLoraParts = 3;

// Elements first_column.. of a row as far as `columns`, zeros beyond. kWhole: 16-byte pieces lie inside or outside as
// a whole.
template <bool kWhole, class T>
__device__ __forceinline__ Vector<T, 8> load_eight(const T* row, int64_t column, int64_t columns) {
  if constexpr (kWhole) {
    return column < columns ? load_vector<8>(row + column) : Vector<T, 8>{};
  } else {
    Floats<T, 8> floats;
#pragma unroll
    for (int i = 0; i < 8; i++) floats[i] = column + i < columns ? to_float(row[column + i]) : 0.0f;
    return pack<T, 8>(floats);
  }
}

template <bool kWhole, class T>
__device__ __forceinline__ void store_eight(T* row, int64_t column, int64_t columns, const Vector<T, 8>& eight) {
  if constexpr (kWhole) {
    if (column < columns) store_vector(row + column, eight);
  } else {
    const auto floats = unpack(eight);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (column + i < columns) row[column + i] = from_float<T>(floats[i]);
    }
  }
}

__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t from = (uint32_t)__cvta_generic_to_shared(row);
  if (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  }
}

// 16-bit types: a warp multiplies 16 rows by kUnits * 32 columns with mma.m16n8k16. In its fragment a thread t = lane % 4
// of row g = lane / 4 holds columns 2t and 2t + 1 of each tile of 8. Tile j of a unit is given the columns 8i + 2j and
// 8i + 2j + 1 (i = 0..3), so that the four tiles leave a thread with the eight adjacent columns 8t..8t+7: 16 bytes.
// kWhole: rows of in and out are whole 16-byte pieces. kSteps: steps of 16 ranks whose `left` is loaded at once.
template <class T, int kUnits, int kSteps, bool kRightByRank, bool kWhole>
struct LowRankTile {
  static constexpr int kRows = 16;
  static constexpr int kColumns = kLowRankThreads * kUnits;
  static constexpr int kPad = 8;  // rows of shared memory begin in different banks

  static __host__ __device__ int depth_of(int rank) { return (rank + 15) / 16 * 16; }
  static int64_t shared_bytes(int rank) {
    const int64_t depth = depth_of(rank);
    return (kRightByRank ? depth * (kColumns + kPad) : kColumns * (depth + kPad)) * (int64_t)sizeof(T);
  }

  struct Piece {
    Vector<T, 8> in[kUnits][2];  // rows g and g + 8
  };

  const LowRank<T>& op;
  T* shared;
  const int64_t column0;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 32 * kUnits;

  __device__ __forceinline__ Vector<T, 8> right_eight(const T* row, int64_t at, int64_t limit) const {
    return op.right_whole ? load_eight<true>(row, at, limit) : load_eight<false>(row, at, limit);
  }

  __device__ __forceinline__ void stage() const {
    const int depth = depth_of(op.rank);
    if (kRightByRank) {
      for (int i = threadIdx.x; i < depth * (kColumns / 8); i += kLowRankThreads) {
        const int k = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
        const auto eight = right_eight(op.right + k * op.right_stride, column0 + c, k < op.rank ? op.columns : 0);
        T* to = shared + k * (kColumns + kPad) + c / 32 * 32 + c % 32 / 4;
#pragma unroll
        for (int j = 0; j < 4; j++) *reinterpret_cast<uint32_t*>(to + j * 8) = eight.words[j];
      }
    } else {
      for (int i = threadIdx.x; i < kColumns * (depth / 8); i += kLowRankThreads) {
        const int c = i / (depth / 8), k = i % (depth / 8) * 8;
        const int64_t limit = column0 + c < op.columns ? op.rank : 0;
        const auto eight = right_eight(op.right + (column0 + c) * op.right_stride, k, limit);
        const int to = c / 32 * 32 + c % 8 / 2 * 8 + c % 32 / 8 * 2 + c % 2;
        *reinterpret_cast<uint4*>(shared + to * (depth + kPad) + k) =
            make_uint4(eight.words[0], eight.words[1], eight.words[2], eight.words[3]);
      }
    }
  }

  __device__ __forceinline__ uint32_t left_pair(int64_t row, int k) const {
    if (row >= op.rows || k >= op.rank) return 0;
    const T* from = op.left + row * op.left_stride + k;
    if (op.left_pairs) return load_vector<2>(from).words[0];
    const float two[2] = {to_float(from[0]), k + 1 < op.rank ? to_float(from[1]) : 0.0f};
    return Word<T>::pack(two);
  }

  __device__ __forceinline__ void load(Piece& piece, int64_t row0) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; unit++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t row = row0 + lane / 4 + half * 8, column = column0 + first + unit * 32 + lane % 4 * 8;
        piece.in[unit][half] = load_eight<kWhole>(op.in + row * op.in_stride, column, row < op.rows ? op.columns : 0);
      }
    }
  }

  // Fragments of two tiles (2 * pair and the next) of 8 columns and 16 ranks.
  __device__ __forceinline__ void load_right(uint32_t (&right)[4], int step, int unit, int pair, int depth) const {
    const int i = lane % 8, matrix = lane / 8;  // matrices: tile, upper ranks, next tile, its upper ranks
    const int tile = pair * 2 + matrix / 2, k = step * 16 + matrix % 2 * 8, column = first + unit * 32 + tile * 8;
    if (kRightByRank) {
      load_matrices<true>(right, shared + (k + i) * (kColumns + kPad) + column);
    } else {
      load_matrices<false>(right, shared + (column + i) * (depth + kPad) + k);
    }
  }

  __device__ __forceinline__ void finish(const Piece& piece, int64_t row0) const {
    float sum[kUnits][4][4] = {};
    const int depth = depth_of(op.rank);
    for (int step0 = 0; step0 < depth / 16; step0 += kSteps) {
      uint32_t left[kSteps][4];
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int k = (step0 + step) * 16 + i / 2 * 8 + lane % 4 * 2;
          left[step][i] = left_pair(row0 + lane / 4 + i % 2 * 8, k);
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        if ((step0 + step) * 16 >= depth) break;
#pragma unroll
        for (int unit = 0; unit < kUnits; unit++) {
#pragma unroll
          for (int pair = 0; pair < 2; pair++) {
            uint32_t right[4];
            load_right(right, step0 + step, unit, pair, depth);
            multiply_add(sum[unit][2 * pair], left[step], right[0], right[1], T{});
            multiply_add(sum[unit][2 * pair + 1], left[step], right[2], right[3], T{});
          }
        }
      }
    }
#pragma unroll
    for (int unit = 0; unit < kUnits; unit++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t row = row0 + lane / 4 + half * 8, column = column0 + first + unit * 32 + lane % 4 * 8;
        Vector<T, 8> result = piece.in[unit][half];
        if (op.rank > 0) {
          auto floats = unpack(result);
#pragma unroll
          for (int i = 0; i < 8; i++) floats[i] += op.scale * sum[unit][i / 2][half * 2 + i % 2];
          result = pack<T, 8>(floats);
        }
        store_eight<kWhole>(op.out + row * op.out_stride, column, row < op.rows ? op.columns : 0, result);
      }
    }
  }
};

// float32, without tensor cores (TF32 is not float32): a thread takes 4 rows by 4 columns.
template <int kUnits, int kSteps, bool kRightByRank, bool kWhole>
struct LowRankTile<float, kUnits, kSteps, kRightByRank, kWhole> {
  static constexpr int kRows = 32;
  static constexpr int kColumns = 64;
  static constexpr int kPitch = kColumns + 4;

  static int64_t shared_bytes(int rank) { return (int64_t)rank * kPitch * (int64_t)sizeof(float); }

  struct Piece {
    Vector<float, 4> in[4];
  };

  const LowRank<float>& op;
  float* shared;
  const int64_t column0;
  const int first = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 4;

  __device__ __forceinline__ void stage() const {
    for (int i = threadIdx.x; i < op.rank * kColumns; i += kLowRankThreads) {
      const int k = kRightByRank ? i / kColumns : i % op.rank, c = kRightByRank ? i % kColumns : i / op.rank;
      const int64_t at = kRightByRank ? k * op.right_stride + column0 + c : (column0 + c) * op.right_stride + k;
      shared[k * kPitch + c] = column0 + c < op.columns ? op.right[at] : 0.0f;
    }
  }

  __device__ __forceinline__ void load(Piece& piece, int64_t row0) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      piece.in[i] = {};
      if (row0 + row + i >= op.rows) continue;
      const float* from = op.in + (row0 + row + i) * op.in_stride;
      const int64_t column = column0 + first;
      if constexpr (kWhole) {
        if (column < op.columns) piece.in[i] = load_vector<4>(from + column);
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (column + j < op.columns) piece.in[i].words[j] = __float_as_uint(from[column + j]);
        }
      }
    }
  }

  __device__ __forceinline__ void finish(const Piece& piece, int64_t row0) const {
    float sum[4][4] = {};
    for (int k = 0; k < op.rank; k++) {
      const auto right = unpack(load_vector<4>(shared + k * kPitch + first));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float left = row0 + row + i < op.rows ? op.left[(row0 + row + i) * op.left_stride + k] : 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = fmaf(left, right[j], sum[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (row0 + row + i >= op.rows) continue;
      float* to = op.out + (row0 + row + i) * op.out_stride;
      const int64_t column = column0 + first;
      auto result = unpack(piece.in[i]);
#pragma unroll
      for (int j = 0; j < 4; j++) result[j] = op.rank > 0 ? result[j] + op.scale * sum[i][j] : result[j];
      if constexpr (kWhole) {
        if (column < op.columns) store_vector(to + column, pack<float, 4>(result));
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (column + j < op.columns) to[column + j] = result[j];
        }
      }
    }
  }
};

// Rows first_row to last_row of a block's columns; the tile is staged and the block has waited for its predecessor.
template <class Tile>
__device__ __forceinline__ void low_rank_rows(const Tile& tile, int64_t first_row, int64_t last_row) {
  typename Tile::Piece current, next;
  tile.load(current, first_row);
  __syncthreads();  // what all have staged
  for (int64_t row = first_row; row < last_row; row += Tile::kRows) {
    if (row + Tile::kRows < last_row) tile.load(next, row + Tile::kRows);
    tile.finish(current, row);
    current = next;
  }
}

// Rows a block walks down: enough blocks for every multiprocessor, and few enough to stage `right` seldom.
inline int64_t low_rank_chunk(int64_t rows, int64_t column_tiles, int tile_rows) {
  const int64_t wanted = ceil_div(rows * column_tiles, (int64_t)device_info().multiprocessors * 8);
  const int64_t chunk = round_up(wanted, tile_rows);
  return chunk < 256 ? chunk : 256;
}

}  // namespace ember
