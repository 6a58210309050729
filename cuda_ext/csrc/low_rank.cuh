// out = in + scale * left . right for a matrix of large `in` and a small inner dimension, the rank.
//
// LoRA's two kernels are this: the expansion beside a linear layer (in = out = y, left = x A^T, right = B^T) and the
// rebuild of a weight (in = golden, left = B, right = A). Reading `in` and writing `out` is the work, so a block keeps
// its tile of `right` in shared memory and walks down the rows, with the next rows of `in` on their way to shared memory.
// Products are summed over the rank in one fixed order in float32 and rounded once.
#pragma once

#include "vector.cuh"

namespace ember {

constexpr int kLowRankThreads = 128;
constexpr int kLowRankBlocks = 5;  // a multiprocessor
constexpr int kMaxRank = 256;

template <class T>
struct LowRank {
  const T* in;  // null: zeros
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
  bool left_fours;   // rows of left are whole pieces of four elements
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

// Asynchronous copies of 16 bytes that only the thread that began them reads, so no barrier is needed; `some` false
// fills with zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool some) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from),
               "r"(some ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
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
// 8i + 2j + 1 (i = 0..3), so that the four tiles leave a thread with the eight adjacent columns 8t..8t+7: 16 bytes. A
// sum does not mind the order of its terms, so a thread's ranks, 2t, 2t + 1, 2t + 8 and 2t + 9, are given to the
// adjacent ranks 4t..4t+3 likewise (rank_place).
// kWhole: rows of in and out are whole 16-byte pieces. kSteps: steps of 16 ranks whose `left` is loaded at once.
template <class T, int kUnits, int kSteps, bool kRightByRank, bool kWhole>
struct LowRankTile {
  static constexpr int kRows = 16;
  static constexpr int kColumns = kLowRankThreads * kUnits;
  static constexpr int kPad = 8;     // rows of shared memory begin in different banks
  static constexpr int kStages = 4;  // pieces of `in` on their way
  static constexpr int kPieces = kWhole ? kStages * kUnits * 2 : 0;

  static __host__ __device__ int depth_of(int rank) { return (rank + 15) / 16 * 16; }
  static int64_t shared_bytes(int rank) {
    const int64_t depth = depth_of(rank), right = kRightByRank ? depth * (kColumns + kPad) : kColumns * (depth + kPad);
    return (int64_t)kPieces * kLowRankThreads * 16 + right * (int64_t)sizeof(T);
  }

  struct Left {
    uint32_t words[kSteps][4];
  };

  const LowRank<T>& op;
  unsigned char* memory;  // pieces of `in`, then the tile of `right`
  const int64_t column0;
  T* const shared = (T*)(memory + kPieces * kLowRankThreads * 16);
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 32 * kUnits;

  __device__ __forceinline__ Vector<T, 8> right_eight(const T* row, int64_t at, int64_t limit) const {
    return op.right_whole ? load_eight<true>(row, at, limit) : load_eight<false>(row, at, limit);
  }

  static __device__ __forceinline__ int rank_place(int k) { return k / 16 * 16 + k % 4 / 2 * 8 + k % 16 / 4 * 2 + k % 2; }

  __device__ __forceinline__ void stage() const {
    const int depth = depth_of(op.rank);
    if (kRightByRank) {
#pragma unroll 4
      for (int i = threadIdx.x; i < depth * (kColumns / 8); i += kLowRankThreads) {
        const int k = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
        const auto eight = right_eight(op.right + k * op.right_stride, column0 + c, k < op.rank ? op.columns : 0);
        T* to = shared + rank_place(k) * (kColumns + kPad) + c / 32 * 32 + c % 32 / 4;
#pragma unroll
        for (int j = 0; j < 4; j++) *reinterpret_cast<uint32_t*>(to + j * 8) = eight.words[j];
      }
    } else {
#pragma unroll 2
      for (int k = threadIdx.x % 2 * 8; k < depth; k += 16) {
#pragma unroll
        for (int c = threadIdx.x / 2; c < kColumns; c += kLowRankThreads / 2) {
          const int64_t limit = column0 + c < op.columns ? op.rank : 0;
          const auto eight = right_eight(op.right + (column0 + c) * op.right_stride, k, limit);
          const int row = c / 32 * 32 + c % 8 / 2 * 8 + c % 32 / 8 * 2 + c % 2;
#pragma unroll
          for (int j = 0; j < 4; j++) {
            *reinterpret_cast<uint32_t*>(shared + row * (depth + kPad) + rank_place(k + 2 * j)) = eight.words[j];
          }
        }
      }
    }
  }

  // Ranks k..k+3 of a row.
  __device__ __forceinline__ Vector<T, 4> left_four(int64_t row, int k) const {
    if (row >= op.rows || k >= op.rank) return {};
    const T* from = op.left + row * op.left_stride + k;
    if (op.left_fours) return load_vector<4>(from);
    Floats<T, 4> four;
#pragma unroll
    for (int i = 0; i < 4; i++) four[i] = k + i < op.rank ? to_float(from[i]) : 0.0f;
    return pack<T, 4>(four);
  }

  __device__ __forceinline__ void load_left(Left& left, int64_t row0, int group) const {
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const auto four = left_four(row0 + lane / 4 + half * 8, (group * kSteps + step) * 16 + lane % 4 * 4);
        left.words[step][half] = four.words[0];
        left.words[step][half + 2] = four.words[1];
      }
    }
  }

  __device__ __forceinline__ T* piece(int stage, int unit, int half) const {
    return (T*)(memory + ((stage * kUnits + unit) * 2 + half) * kLowRankThreads * 16 + threadIdx.x * 16);
  }
  __device__ __forceinline__ int64_t row_of(int64_t row0, int half) const { return row0 + lane / 4 + half * 8; }
  __device__ __forceinline__ int64_t column_of(int unit) const { return column0 + first + unit * 32 + lane % 4 * 8; }

  // Sends for the rows from row0 on, if they lie before last_row; an empty group counts too.
  __device__ __forceinline__ void fetch(int64_t row0, int64_t last_row, int stage) const {
    if constexpr (kWhole) {
      if (row0 < last_row) {
#pragma unroll
        for (int unit = 0; unit < kUnits; unit++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const bool inside = op.in && row_of(row0, half) < op.rows && column_of(unit) < op.columns;
            const T* from = inside ? op.in + row_of(row0, half) * op.in_stride + column_of(unit) : op.out;
            copy_async(piece(stage, unit, half), from, inside);
          }
        }
      }
      end_copy_group();
    }
  }

  __device__ __forceinline__ void begin(int64_t first_row, int64_t last_row) const {
#pragma unroll
    for (int stage = 0; stage < kStages; stage++) fetch(first_row + stage * kRows, last_row, stage);
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

  __device__ __forceinline__ void multiply(float (&sum)[kUnits][4][4], const Left& left, int group, int depth) const {
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      const int step = group * kSteps + i;
      if (step * 16 >= depth) break;
#pragma unroll
      for (int unit = 0; unit < kUnits; unit++) {
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
          uint32_t right[4];
          load_right(right, step, unit, pair, depth);
          multiply_add(sum[unit][2 * pair], left.words[i], right[0], right[1], T{});
          multiply_add(sum[unit][2 * pair + 1], left.words[i], right[2], right[3], T{});
        }
      }
    }
  }

  __device__ __forceinline__ void finish(const float (&sum)[kUnits][4][4], int64_t row0, int stage) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; unit++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t row = row_of(row0, half), limit = row < op.rows ? op.columns : 0;
        Vector<T, 8> result;
        if constexpr (kWhole) {
          result = load_vector<8>(piece(stage, unit, half));
        } else {
          result = load_eight<false>(op.in + row * op.in_stride, column_of(unit), op.in ? limit : 0);
        }
        if (op.rank > 0) {
          auto floats = unpack(result);
#pragma unroll
          for (int i = 0; i < 8; i++) floats[i] += op.scale * sum[unit][i / 2][half * 2 + i % 2];
          result = pack<T, 8>(floats);
        }
        store_eight<kWhole>(op.out + row * op.out_stride, column_of(unit), limit, result);
      }
    }
  }

  // After begin() and stage(): the rows from first_row to last_row.
  __device__ __forceinline__ void walk(int64_t first_row, int64_t last_row) const {
    const int depth = depth_of(op.rank), groups = (depth / 16 + kSteps - 1) / kSteps;
    Left next;
    load_left(next, first_row, 0);
    __syncthreads();  // what all have staged
    int stage = 0;
    for (int64_t row = first_row; row < last_row; row += kRows) {
      float sum[kUnits][4][4] = {};
      for (int group = 0; group < groups; group++) {
        const Left left = next;
        const bool more = group + 1 < groups;
        load_left(next, more ? row : row + kRows, more ? group + 1 : 0);
        multiply(sum, left, group, depth);
      }
      if constexpr (kWhole) wait_for_copies<kStages - 1>();
      finish(sum, row, stage);
      fetch(row + kStages * kRows, last_row, stage);
      stage = (stage + 1) % kStages;
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
  unsigned char* memory;
  const int64_t column0;
  float* const shared = (float*)memory;
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
      if (!op.in || row0 + row + i >= op.rows) continue;
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

  __device__ __forceinline__ void begin(int64_t, int64_t) const {}

  __device__ __forceinline__ void walk(int64_t first_row, int64_t last_row) const {
    __syncthreads();  // what all have staged
    for (int64_t row0 = first_row; row0 < last_row; row0 += kRows) {
      Piece piece;
      load(piece, row0);
      finish(piece, row0);
    }
  }
};

// Rows a block walks down: as many blocks as the multiprocessors hold at once, all of one size. Beside its own memory a
// block takes 1 KiB.
inline int64_t low_rank_chunk(int64_t rows, int64_t column_tiles, int tile_rows, int64_t shared_bytes) {
  const int64_t by_memory = device_info().shared_bytes / (shared_bytes + 1024);
  const int64_t blocks = device_info().multiprocessors * (by_memory < kLowRankBlocks ? by_memory : kLowRankBlocks);
  return round_up(ceil_div(rows * column_tiles, blocks), tile_rows);
}

}  // namespace ember
