// What the kernels take: plain pointers and numbers, nothing of a framework.
//
// Shapes: s tokens, b sequences, h query heads, g KV heads, d channels. "Rows" are the d channels of one token, sequence
// and head; they are contiguous everywhere, and 16-byte aligned. Strides count elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dmc {

enum class DType { kBFloat16, kHalf, kFloat };

struct Strides {
  int64_t token = 0, batch = 0, head = 0;
};

struct Shape {
  int tokens, batch, heads, kv_heads, channels;
  int group;  // query heads of a KV head
};

// The rotary tables, float32 rows of one angle a pair of channels; strides without heads. pairs == 0: no rotation.
struct Rotary {
  const float* cos = nullptr;
  const float* sin = nullptr;
  Strides stride;
  int pairs = 0;
  bool interleaved = false;
};

// The last channel of the attention kernel's queries holds `query_channel`, that of its keys bias / bias_per_channel,
// so that their product, scaled, is the bias.
struct BiasChannel {
  float query_channel;
  float bias_per_channel;  // scale * query_channel
};

struct Prepare {
  Shape shape;
  const void *query, *key, *value;  // unrotated, any strides
  Strides query_stride, key_stride, value_stride;
  Rotary rotary;
  const float* noise;        // [s, b, g] added to the decision logits, or null
  const int64_t* noise_key;  // one number that keys the counter-based noise, or null
  uint32_t noise_stream;
  int noise_first_head;
  // Where the tokens are in longer sequences of which these are parts, for the noise: `noise_sequences` parts that begin
  // with noise_first_token, then as many that begin noise_stride tokens later, and so on.
  int noise_first_token, noise_stride, noise_sequences;
  float noise_scale;  // of what noise_key makes
  int window;
  float offset;
  float temperature;  // 0: hard decisions
  float scale;
  BiasChannel bias;
  void* attention_query;  // [s, b, h, d]
  void* attention_key;    // [s, b, g, d]
  void* attention_value;  // [s, b, g, d]
  float* diagonal;        // [b, h, s]
  float* alpha;           // [s, b, g]
  float* weight;          // [s, b, g]
};

struct MergePast {
  int tokens, batch, heads, channels;
  void* output;      // any strides, in place
  const void* past;  // any strides
  float* logsumexp;  // any strides, in place
  const float* past_logsumexp;
  Strides output_stride, past_stride, logsumexp_stride, past_logsumexp_stride;
};

struct MergeDiagonal {
  Shape shape;
  void* output;  // any strides, in place
  Strides output_stride;
  float* logsumexp;        // [b, h, s], in place
  const float* diagonal;   // [b, h, s]
  const void* attention_key;    // [s, b, g, d]
  const void* attention_value;  // [s, b, g, d]
  float bias_per_channel;
};

struct MergeDiagonalBackward {
  Shape shape;
  const void *grad_output, *output;  // any strides
  Strides grad_output_stride, output_stride;
  const float *logsumexp, *diagonal;  // [b, h, s]
  const void *attention_query, *attention_key, *attention_value;  // contiguous
  Rotary rotary;
  float scale;
  float bias_per_channel;
  void *grad_query, *grad_key, *grad_value;  // [s, b, h|g, d], in place
  float* grad_bias;                          // [s, b, g]
};

struct PrepareBackward {
  Shape shape;
  const void *key, *value;  // unrotated, any strides
  Strides key_stride, value_stride;
  const void *grad_merged_key, *grad_merged_value;  // [s, b, g, d]
  const float *alpha, *weight, *grad_bias;          // [s, b, g]
  const float* grad_alpha;                          // or null
  Strides grad_alpha_stride;
  int window;
  float temperature;
  void* grad_query;              // [s, b, h, d]: its last channel is written
  void *grad_key, *grad_value;  // [s, b, g, d]
};

// A page of the cache holds so many entries of one head: their keys, then their values. Chosen when building: 8 to 64.
#ifndef MEGATRON_DMC_PAGE_ENTRIES
#define MEGATRON_DMC_PAGE_ENTRIES 16
#endif
constexpr int kPageEntries = MEGATRON_DMC_PAGE_ENTRIES;
static_assert(kPageEntries == 8 || kPageEntries == 16 || kPageEntries == 32 || kPageEntries == 64);

// New tokens of a sequence in a decoding step.
constexpr int kMaxNewTokens = 8;

// One layer of the paged cache (megatron_dmc/cache.py says what its tensors are), of S slots.
struct PagedLayer {
  void* pages;    // [pages, 2, kPageEntries, d]
  int64_t rows;   // of all pages: keys and values of all entries
  float* scales;  // [pages, 2, kPageEntries] of 8-bit entries, or null: then they have the new tokens' dtype
  int* table;     // [S, g, max_pages]
  int max_pages;
  const int* lengths;     // [S, g]
  const int64_t* tokens;  // [S]

  int recent_tokens;
  void* recent;           // [S, g, recent_tokens, 2, d], with a window
  float* recent_weights;  // [S, g, recent_tokens]
  float* mean;            // [2, S, g, 2, d], without one
  float* total;           // [2, S, g]
  int64_t state_stride;   // S * g
  const int64_t* steps;   // [S]
};

// New tokens that enter it, and how.
struct NewTokens {
  Shape shape;
  const void *query, *key, *value;  // unrotated, any strides
  Strides query_stride, key_stride, value_stride;
  Rotary rotary;  // by position
  int window;
  float offset, scale;
  const int64_t* slots;  // [b], -1: nobody
  bool* ok;              // whether there are pages for the step; without them nothing happens
  int* new_lengths;      // [b, g]
  void* output;          // [n, b, h, d], any strides
  Strides output_stride;
  float* alpha;  // [n, b, g]
  Strides alpha_stride;
};

// A step of decoding: up to kMaxNewTokens tokens of each of b sequences.
struct PagedAttention {
  NewTokens in;
  PagedLayer cache;
  int workers;            // warps for every 16 queries of a KV head, several in a thread block
  const int* first_unit;  // [b * g + 1] units of work of the heads before
  const int* first_head;  // [workers] the head that a worker's first unit belongs to
  float* partial;         // [workers, 2, tiles of 16 queries, 16, d + 2], of which each block uses one worker's
  int* arrived;           // [b * g, tiles of 16 queries], 0 before and after
};

// A unit of work is as long as it takes to attend to so many entries.
constexpr int kUnitEntries = 16;

// Tokens of a chunk whose entries are counted together.
constexpr int kDecideBlock = 1024;

// Chunks of prompts: any number of tokens of each of c sequences, one after the other; in `in`, tokens are all of them,
// the strides of sequences are 0, and b is c.
struct PagedChunks {
  NewTokens in;
  PagedLayer cache;
  const int* first_token;  // [c + 1] where each chunk begins
  int longest;             // tokens of the longest chunk
  const int* free;         // the stack of free pages,
  int64_t* free_count;     // and how many it holds
  int* entry;              // [tokens, g] the entry of its head that a token is part of, from where its block begins:
  int* before;             // [c, g, blocks of the longest chunk] entries before each block of kDecideBlock tokens
  float* weight;           // [tokens, g]
  void* own;               // [tokens, g, 2, d] a token's entry as it stood then, if the next token changed it
  float* own_score;        // [tokens, h] of its queries with it, or null where attend_hopper does not need it
  void* last;              // [c, g, window - 1, 2, d] each chunk's last tokens, for the ring
  float* last_weights;     // [c, g, window - 1]
};

// The longest window whose tiles fit into the shared memory that a thread block may use on the current device.
int max_window(DType dtype, int channels);

// Each launches one kernel and returns the launch's error.
cudaError_t prepare(const Prepare&, DType, cudaStream_t);
cudaError_t merge_past(const MergePast&, DType, cudaStream_t);
cudaError_t merge_diagonal(const MergeDiagonal&, DType, cudaStream_t);
cudaError_t merge_diagonal_backward(const MergeDiagonalBackward&, DType, cudaStream_t);
cudaError_t prepare_backward(const PrepareBackward&, DType, cudaStream_t);
cudaError_t paged_attention(const PagedAttention&, DType, cudaStream_t);

// How many workers the current device runs at once, for 16-bit entries and for 8-bit ones; 0 for what it cannot run.
int paged_workers(DType, int channels, bool scaled);

// Four kernels, one after the other; the last error of their launches.
cudaError_t paged_chunks(const PagedChunks&, DType, cudaStream_t);

// The last of them for Hopper, and whether it can take this.
bool attend_hopper_takes(const PagedChunks&);
cudaError_t attend_hopper(const PagedChunks&, DType, cudaStream_t);

}  // namespace dmc
