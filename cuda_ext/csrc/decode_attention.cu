// Group decode attention over the paged KV cache: one query token a row.
//
// Where pieces have 128 tokens, for engines of few rows, one kernel does all (decode_attention_few.cu). Else there are
// two. The split kernel (decode_attention_splits.cu) computes partial results over pieces of split_tokens
// tokens: a group's prefix once for all its candidates, whose query heads of one KV head form a tensor-core tile, and
// the full pieces of long suffixes. The finish kernel (decode_attention_finish.cu) computes the last piece of each
// row's suffix and merges (the split-KV merge of FlashDecoding; Hydragen, Juravsky et al. 2024, section 3.2).
// What neither takes goes to decode_attention_generic.cu.
#include "decode_attention.cuh"

namespace ember::decode {

bool fits_tensor_cores(const Problem& p, int64_t dtype) {
  const bool block_fits =
      p.block_size >= 16 && p.block_size <= p.split_tokens && (p.block_size & (p.block_size - 1)) == 0;
  return dtype != kFloat32 && (p.head_dim == 64 || p.head_dim == 128) && p.share() <= 8 && block_fits &&
         p.split_tokens % kTileTokens == 0 && p.split_tokens % p.block_size == 0;
}

}  // namespace ember::decode

// q, out: [rows, heads, head_dim]; k, v: [num_slots, kv_heads, head_dim]; partials: [num_partials, heads, head_dim]
// float16, with arrivals float32; stats: [num_partials, heads, 4] float32; the int32 arrays as in
// cuda_ext/decode_groups.py, arrivals null where their pieces are not for one launch. method: 0 what fits best, 1 the
// generic kernel.
EMBER_API int ember_decode_attention(const void* q, const void* k, const void* v, void* out, void* partials,
                                     void* stats, const int* row_group, const int* prefix_blocks,
                                     const int* prefix_starts, const int* prefix_lens, const int* suffix_blocks,
                                     const int* suffix_starts, const int* suffix_lens, const int* partial_starts,
                                     const int* items, const int* num_items, int* arrivals, int64_t max_items,
                                     int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                     int64_t block_size, int64_t split_tokens, int64_t dtype, int64_t method,
                                     float scale, cudaStream_t stream) {
  using namespace ember::decode;
  const Problem p = {q, k, v, out, static_cast<ember::fp16*>(partials), static_cast<float2*>(stats), row_group,
                     prefix_blocks, prefix_starts, prefix_lens, suffix_blocks, suffix_starts, suffix_lens,
                     partial_starts, items, num_items, (int)max_items, (int)rows, (int)heads, (int)kv_heads,
                     (int)head_dim, (int)block_size, (int)split_tokens, scale, arrivals};
  if (rows == 0) return 0;
  if (method == 1 || !fits_tensor_cores(p, dtype)) return launch_generic(p, dtype, stream);
  if (takes_few(p, dtype)) return launch_few(p, dtype, stream);
  const int status = launch_splits(p, dtype, stream);
  return status ? status : launch_finish(p, dtype, stream);
}
