// What surrounds the layers of a decode step: inputs from the rows' state, embeddings, and the append of drawn tokens.
// The references are in cuda_ext/decode_state.py.
#include "common.cuh"

namespace ember {

constexpr int kMaxStopIds = 8;
constexpr int kStop = 1, kLength = 2, kNotAToken = -1;  // codes of a row after a step

__global__ void __launch_bounds__(128) decode_inputs_kernel(
    const int* slot, const int* prompt_len, const int* last_token, const int* num_tokens, const int* finished,
    const int* suffix_blocks, const int* suffix_starts, int* suffix_lens, int64_t* token_ids, int64_t* positions,
    int64_t* kv_slots, int rows, int block_size, int64_t trash_slot) {
  let_successor_start();
  wait_for_predecessor();
  const int row = blockIdx.x * 128 + threadIdx.x;
  if (row >= rows) return;
  const int place = slot[row];
  int64_t token = 0, position = 0, kv_slot = trash_slot;
  int suffix_len = 0;
  if (place >= 0) {
    token = last_token[place];
    suffix_len = 1;
    if (finished[place] == 0) {
      suffix_len = num_tokens[place];
      position = (int64_t)prompt_len[row] + suffix_len - 1;
      const int last = max(suffix_len - 1, 0);
      kv_slot = (int64_t)suffix_blocks[suffix_starts[row] + last / block_size] * block_size + last % block_size;
    }
  }
  token_ids[row] = token;
  positions[row] = position;
  kv_slots[row] = kv_slot;
  suffix_lens[row] = suffix_len;
}

// Copies a line of `words` words a block.
template <class Word>
__global__ void __launch_bounds__(256) embed_kernel(
    const Word* embedding, const int64_t* token_ids, Word* out, int64_t words) {
  let_successor_start();
  wait_for_predecessor();
  const Word* from = embedding + token_ids[blockIdx.x] * words;
  Word* to = out + (int64_t)blockIdx.x * words;
  for (int64_t i = threadIdx.x; i < words; i += 256) to[i] = from[i];
}

// One block, so that the step is counted after all rows have been written.
__global__ void __launch_bounds__(1024) append_kernel(
    const int* tokens, const float* logprobs, const float* sampling_logprobs, const int* slot, const int* max_tokens,
    const int* stop_ids, int* last_token, int* num_tokens, int* finished, int* out_tokens, float* out_logprobs,
    float* out_sampling_logprobs, int* out_codes, int* step, int rows, int rows_capacity, int max_steps) {
  let_successor_start();
  wait_for_predecessor();
  const int line = *step;
  const int64_t start = (int64_t)(line % max_steps) * rows_capacity;
  for (int row = threadIdx.x; row < rows; row += 1024) {
    const int place = slot[row], token = tokens[row];
    int code = kNotAToken;
    if (place >= 0 && finished[place] == 0) {
      const int count = num_tokens[place] + 1;
      code = count >= max_tokens[row] ? kLength : 0;
#pragma unroll
      for (int i = 0; i < kMaxStopIds; ++i) {
        if (stop_ids[row * kMaxStopIds + i] == token) code = kStop;
      }
      last_token[place] = token;
      num_tokens[place] = count;
      finished[place] = code;
    }
    out_tokens[start + row] = token;
    out_logprobs[start + row] = logprobs[row];
    out_sampling_logprobs[start + row] = sampling_logprobs[row];
    out_codes[start + row] = code;
  }
  __syncthreads();
  if (threadIdx.x == 0) *step = line + 1;
}

}  // namespace ember

EMBER_API int ember_decode_inputs(
    const int* slot, const int* prompt_len, const int* last_token, const int* num_tokens, const int* finished,
    const int* suffix_blocks, const int* suffix_starts, int* suffix_lens, int64_t* token_ids, int64_t* positions,
    int64_t* kv_slots, int64_t rows, int64_t block_size, int64_t trash_slot, cudaStream_t stream) {
  if (rows == 0) return 0;
  return ember::launch(ember::decode_inputs_kernel, dim3((unsigned)((rows + 127) / 128)), 128, 0, stream, slot,
                       prompt_len, last_token, num_tokens, finished, suffix_blocks, suffix_starts, suffix_lens,
                       token_ids, positions, kv_slots, (int)rows, (int)block_size, trash_slot);
}

EMBER_API int ember_embed(
    const void* embedding, const int64_t* token_ids, void* out, int64_t rows, int64_t row_bytes, cudaStream_t stream) {
  if (rows == 0) return 0;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(embedding) | reinterpret_cast<uintptr_t>(out) | row_bytes;
  const dim3 grid((unsigned)rows);
  if (bits % 16 == 0) {
    return ember::launch(ember::embed_kernel<uint4>, grid, 256, 0, stream, static_cast<const uint4*>(embedding),
                         token_ids, static_cast<uint4*>(out), row_bytes / 16);
  }
  return ember::launch(ember::embed_kernel<uint16_t>, grid, 256, 0, stream, static_cast<const uint16_t*>(embedding),
                       token_ids, static_cast<uint16_t*>(out), row_bytes / 2);
}

EMBER_API int ember_append_tokens(
    const int* tokens, const float* logprobs, const float* sampling_logprobs, const int* slot, const int* max_tokens,
    const int* stop_ids, int* last_token, int* num_tokens, int* finished, int* out_tokens, float* out_logprobs,
    float* out_sampling_logprobs, int* out_codes, int* step, int64_t rows, int64_t rows_capacity, int64_t max_steps,
    cudaStream_t stream) {
  return ember::launch(ember::append_kernel, dim3(1), 1024, 0, stream, tokens, logprobs, sampling_logprobs, slot,
                       max_tokens, stop_ids, last_token, num_tokens, finished, out_tokens, out_logprobs,
                       out_sampling_logprobs, out_codes, step, (int)rows, (int)rows_capacity, (int)max_steps);
}
