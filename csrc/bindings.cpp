// The operators as torch sees them: schemas, checks, allocation. Built on torch's stable ABI, so that one build serves
// torch 2.11 and later. Fake implementations and autograd are in megatron_dmc/ops/fused.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using dmc::Shape;
using dmc::Strides;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  ((message << parts), ...);
  throw std::invalid_argument(message.str());
}

std::string text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

bool same(torch::headeronly::IntHeaderOnlyArrayRef sizes, const Sizes& other) {
  if (sizes.size() != other.size()) return false;
  for (size_t i = 0; i < other.size(); ++i)
    if (sizes[i] != other[i]) return false;
  return true;
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return "another dtype";
  }
}

dmc::DType kernel_dtype(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return dmc::DType::kBFloat16;
    case ScalarType::Half: return dmc::DType::kHalf;
    case ScalarType::Float: return dmc::DType::kFloat;
    default:
      require(false, name, " must be bfloat16, float16 or float32; got ", name_of(x.scalar_type()));
      return {};
  }
}

// One call: checks arguments against the first one, names them when they do not fit.
struct Call {
  const Tensor& first;
  const char* first_name;

  void matches(const Tensor& x, const char* name, const Sizes& sizes, ScalarType dtype) const {
    require(x.is_cuda() && x.get_device_index() == first.get_device_index(), name, " must be on the CUDA device of ",
            first_name);
    require(x.scalar_type() == dtype, name, " must be ", name_of(dtype), "; got ", name_of(x.scalar_type()));
    require(same(x.sizes(), sizes), name, " must be ",
            text(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size())), "; got ", text(x.sizes()));
  }

  const void* contiguous(const Tensor& x, const char* name, const Sizes& sizes, ScalarType dtype) const {
    matches(x, name, sizes, dtype);
    require(x.is_contiguous(), name, " must be contiguous; its strides are ", text(x.strides()));
    return x.const_data_ptr();
  }
  const float* floats(const Tensor& x, const char* name, const Sizes& sizes) const {
    return static_cast<const float*>(contiguous(x, name, sizes, ScalarType::Float));
  }
  void* contiguous_out(const Tensor& x, const char* name, const Sizes& sizes, ScalarType dtype) const {
    contiguous(x, name, sizes, dtype);
    return x.mutable_data_ptr();
  }

  // Rows of channels, read 16 bytes at a time, at any strides that allow it.
  Strides rows(const Tensor& x, const char* name, const Sizes& sizes, ScalarType dtype) const {
    matches(x, name, sizes, dtype);
    require(x.stride(3) == 1, name, " must have stride 1 in its last dimension; its strides are ", text(x.strides()),
            " (call .contiguous() on it)");
    const int64_t whole = dtype == ScalarType::Float ? 4 : 8;
    bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    for (int i = 0; i < 3; ++i) aligned = aligned && (x.size(i) == 1 || x.stride(i) % whole == 0);
    require(aligned, name, " must have rows that begin at multiples of 16 bytes; its strides are ", text(x.strides()),
            " (call .contiguous() on it)");
    return {x.stride(0), x.stride(1), x.stride(2)};
  }

  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }
};

Shape shape_of(const Tensor& query, const Tensor& key) {
  require(query.is_cuda(), "query must be on a CUDA device");
  require(query.dim() == 4, "query must be [tokens, sequences, heads, channels]; got ", text(query.sizes()));
  require(key.dim() == 4, "key must be [tokens, sequences, KV heads, channels]; got ", text(key.sizes()));
  require(query.size(0) > 0 && query.size(1) > 0, "query has no tokens: ", text(query.sizes()));
  require(key.size(2) > 0 && query.size(2) % key.size(2) == 0, "query has ", query.size(2), " heads, key ",
          key.size(2), " KV heads: the first must be a multiple of the second");
  const int64_t d = query.size(3);
  require(d == 64 || d == 96 || d == 128 || d == 256, "query has ", d, " channels; the kernels are built for 64, 96, 128, 256");
  // A launch has at most 65535 tiles of tokens; the smallest tiles hold 16 of float32, 32 of 16-bit numbers.
  const int64_t most = 65535 * (query.scalar_type() == ScalarType::Float ? 16 : 32);
  require(query.size(0) <= most && query.size(1) <= 65535, "query has ", query.size(0), " tokens of ", query.size(1),
          " sequences; a call takes ", most, " of 65535");
  return {int(query.size(0)), int(query.size(1)), int(query.size(2)), int(key.size(2)), int(d),
          int(query.size(2) / key.size(2))};
}

Sizes query_sizes(const Shape& s) { return {s.tokens, s.batch, s.heads, s.channels}; }
Sizes key_sizes(const Shape& s) { return {s.tokens, s.batch, s.kv_heads, s.channels}; }
Sizes scalar_sizes(const Shape& s) { return {s.tokens, s.batch, s.kv_heads}; }
Sizes score_sizes(const Shape& s) { return {s.batch, s.heads, s.tokens}; }

dmc::Rotary rotary_of(const Call& call, const Shape& shape, const std::optional<Tensor>& cos,
                      const std::optional<Tensor>& sin, bool interleaved) {
  dmc::Rotary rotary;
  rotary.interleaved = interleaved;
  require(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  if (!cos) return rotary;
  const int64_t pairs = cos->size(cos->dim() - 1);
  require(2 * pairs <= shape.channels, "cos has ", pairs, " pairs of channels; heads have ", shape.channels / 2);
  const bool by_sequence = cos->dim() == 3;
  const Sizes sizes = by_sequence ? Sizes{shape.tokens, shape.batch, pairs} : Sizes{shape.tokens, pairs};
  rotary.cos = call.floats(*cos, "cos", sizes);
  rotary.sin = call.floats(*sin, "sin", sizes);
  rotary.stride = {by_sequence ? shape.batch * pairs : pairs, by_sequence ? pairs : 0, 0};
  rotary.pairs = int(pairs);
  return rotary;
}

int checked_window(int64_t window, const Shape& shape, dmc::DType dtype) {
  const int longest = dmc::max_window(dtype, shape.channels);
  require(window >= 1 && window <= longest, "window must be 1 to ", longest, " tokens here; got ", window);
  return int(window);
}

void launched(cudaError_t error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prepare(
    const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> cos, std::optional<Tensor> sin,
    std::optional<Tensor> noise, std::optional<Tensor> noise_key, int64_t noise_stream, int64_t noise_first_head,
    int64_t window, double offset, std::optional<double> temperature, bool interleaved, double scale,
    double query_channel, int64_t noise_first_token, int64_t noise_stride, int64_t noise_sequences,
    double noise_scale) {
  const Call call{query, "query"};
  dmc::Prepare p{};
  p.shape = shape_of(query, key);
  const dmc::DType dtype = kernel_dtype(query, "query");
  const ScalarType type = query.scalar_type();
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  p.query_stride = call.rows(query, "query", query_sizes(p.shape), type);
  p.key_stride = call.rows(key, "key", key_sizes(p.shape), type);
  p.value_stride = call.rows(value, "value", key_sizes(p.shape), type);
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.rotary = rotary_of(call, p.shape, cos, sin, interleaved);
  if (noise) p.noise = call.floats(*noise, "noise", scalar_sizes(p.shape));
  if (noise_key)
    p.noise_key = static_cast<const int64_t*>(call.contiguous(*noise_key, "noise_key", {1}, ScalarType::Long));
  require(!noise || !noise_key, "give noise or noise_key, not both");
  require(temperature || (!noise && !noise_key), "noise belongs to soft decisions: give a temperature as well");
  require(!temperature || *temperature > 0, "temperature must be positive, or None for hard decisions");
  p.noise_stream = uint32_t(noise_stream);
  p.noise_first_head = int(noise_first_head);
  p.noise_first_token = int(noise_first_token);
  p.noise_stride = int(noise_stride);
  require(noise_sequences >= 0, "noise_sequences must be 0 (all of them) or their number; got ", noise_sequences);
  p.noise_sequences = noise_sequences ? int(noise_sequences) : p.shape.batch;
  p.noise_scale = float(noise_scale);
  p.window = checked_window(window, p.shape, dtype);
  p.offset = float(offset);
  p.temperature = float(temperature.value_or(0));
  p.scale = float(scale);
  p.bias = {float(query_channel), float(scale) * float(query_channel)};

  Tensor attention_query = torch::stable::new_empty(query, query_sizes(p.shape));
  Tensor attention_key = torch::stable::new_empty(query, key_sizes(p.shape));
  Tensor attention_value = torch::stable::new_empty(query, key_sizes(p.shape));
  Tensor diagonal = torch::stable::new_empty(query, score_sizes(p.shape), ScalarType::Float);
  Tensor alpha = torch::stable::new_empty(query, scalar_sizes(p.shape), ScalarType::Float);
  Tensor weight = torch::stable::new_empty(query, scalar_sizes(p.shape), ScalarType::Float);
  p.attention_query = attention_query.mutable_data_ptr();
  p.attention_key = attention_key.mutable_data_ptr();
  p.attention_value = attention_value.mutable_data_ptr();
  p.diagonal = static_cast<float*>(diagonal.mutable_data_ptr());
  p.alpha = static_cast<float*>(alpha.mutable_data_ptr());
  p.weight = static_cast<float*>(weight.mutable_data_ptr());
  launched(dmc::prepare(p, dtype, call.stream()));
  return {attention_query, attention_key, attention_value, diagonal, alpha, weight};
}

void merge_past(Tensor output, Tensor logsumexp, const Tensor& past, const Tensor& past_logsumexp) {
  const Call call{output, "output"};
  const Shape shape = shape_of(output, output);
  const ScalarType type = output.scalar_type();
  const dmc::DType dtype = kernel_dtype(output, "output");
  const torch::stable::accelerator::DeviceGuard guard(output.get_device_index());
  dmc::MergePast p{shape.tokens, shape.batch, shape.heads, shape.channels};
  p.output_stride = call.rows(output, "output", query_sizes(shape), type);
  p.past_stride = call.rows(past, "past", query_sizes(shape), type);
  auto strides = [&](const Tensor& x, const char* name) -> Strides {
    call.matches(x, name, score_sizes(shape), ScalarType::Float);
    return {x.stride(2), x.stride(0), x.stride(1)};
  };
  p.logsumexp_stride = strides(logsumexp, "logsumexp");
  p.past_logsumexp_stride = strides(past_logsumexp, "past_logsumexp");
  p.output = output.mutable_data_ptr();
  p.past = past.const_data_ptr();
  p.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
  p.past_logsumexp = static_cast<const float*>(past_logsumexp.const_data_ptr());
  launched(dmc::merge_past(p, dtype, call.stream()));
}

void merge_diagonal(Tensor output, Tensor logsumexp, const Tensor& diagonal, const Tensor& attention_key,
                    const Tensor& attention_value, double bias_per_channel) {
  const Call call{output, "output"};
  dmc::MergeDiagonal p{};
  p.shape = shape_of(output, attention_key);
  const ScalarType type = output.scalar_type();
  const dmc::DType dtype = kernel_dtype(output, "output");
  const torch::stable::accelerator::DeviceGuard guard(output.get_device_index());
  p.output_stride = call.rows(output, "output", query_sizes(p.shape), type);
  p.output = output.mutable_data_ptr();
  p.logsumexp = static_cast<float*>(call.contiguous_out(logsumexp, "logsumexp", score_sizes(p.shape), ScalarType::Float));
  p.diagonal = call.floats(diagonal, "diagonal", score_sizes(p.shape));
  p.attention_key = call.contiguous(attention_key, "attention_key", key_sizes(p.shape), type);
  p.attention_value = call.contiguous(attention_value, "attention_value", key_sizes(p.shape), type);
  p.bias_per_channel = float(bias_per_channel);
  launched(dmc::merge_diagonal(p, dtype, call.stream()));
}

Tensor merge_diagonal_backward(const Tensor& grad_output, const Tensor& output, const Tensor& logsumexp,
                               const Tensor& diagonal, const Tensor& attention_query, const Tensor& attention_key,
                               const Tensor& attention_value, Tensor grad_query, Tensor grad_key, Tensor grad_value,
                               std::optional<Tensor> cos, std::optional<Tensor> sin, bool interleaved, double scale,
                               double bias_per_channel) {
  const Call call{attention_query, "attention_query"};
  dmc::MergeDiagonalBackward p{};
  p.shape = shape_of(attention_query, attention_key);
  const ScalarType type = attention_query.scalar_type();
  const dmc::DType dtype = kernel_dtype(attention_query, "attention_query");
  const torch::stable::accelerator::DeviceGuard guard(attention_query.get_device_index());
  p.grad_output_stride = call.rows(grad_output, "grad_output", query_sizes(p.shape), type);
  p.output_stride = call.rows(output, "output", query_sizes(p.shape), type);
  p.grad_output = grad_output.const_data_ptr();
  p.output = output.const_data_ptr();
  p.logsumexp = call.floats(logsumexp, "logsumexp", score_sizes(p.shape));
  p.diagonal = call.floats(diagonal, "diagonal", score_sizes(p.shape));
  p.attention_query = call.contiguous(attention_query, "attention_query", query_sizes(p.shape), type);
  p.attention_key = call.contiguous(attention_key, "attention_key", key_sizes(p.shape), type);
  p.attention_value = call.contiguous(attention_value, "attention_value", key_sizes(p.shape), type);
  p.rotary = rotary_of(call, p.shape, cos, sin, interleaved);
  p.scale = float(scale);
  p.bias_per_channel = float(bias_per_channel);
  p.grad_query = call.contiguous_out(grad_query, "grad_query", query_sizes(p.shape), type);
  p.grad_key = call.contiguous_out(grad_key, "grad_key", key_sizes(p.shape), type);
  p.grad_value = call.contiguous_out(grad_value, "grad_value", key_sizes(p.shape), type);
  Tensor grad_bias = torch::stable::new_empty(attention_query, scalar_sizes(p.shape), ScalarType::Float);
  p.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  launched(dmc::merge_diagonal_backward(p, dtype, call.stream()));
  return grad_bias;
}

std::tuple<Tensor, Tensor> prepare_backward(Tensor grad_query, const Tensor& grad_merged_key,
                                            const Tensor& grad_merged_value, const Tensor& grad_bias,
                                            std::optional<Tensor> grad_alpha, const Tensor& key, const Tensor& value,
                                            const Tensor& alpha, const Tensor& weight, int64_t window,
                                            std::optional<double> temperature) {
  const Call call{key, "key"};
  dmc::PrepareBackward p{};
  p.shape = shape_of(grad_query, key);
  const ScalarType type = key.scalar_type();
  const dmc::DType dtype = kernel_dtype(key, "key");
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  p.key_stride = call.rows(key, "key", key_sizes(p.shape), type);
  p.value_stride = call.rows(value, "value", key_sizes(p.shape), type);
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.grad_merged_key = call.contiguous(grad_merged_key, "grad_merged_key", key_sizes(p.shape), type);
  p.grad_merged_value = call.contiguous(grad_merged_value, "grad_merged_value", key_sizes(p.shape), type);
  p.alpha = call.floats(alpha, "alpha", scalar_sizes(p.shape));
  p.weight = call.floats(weight, "weight", scalar_sizes(p.shape));
  p.grad_bias = call.floats(grad_bias, "grad_bias", scalar_sizes(p.shape));
  if (grad_alpha) {
    call.matches(*grad_alpha, "grad_alpha", scalar_sizes(p.shape), ScalarType::Float);
    p.grad_alpha = static_cast<const float*>(grad_alpha->const_data_ptr());
    p.grad_alpha_stride = {grad_alpha->stride(0), grad_alpha->stride(1), grad_alpha->stride(2)};
  }
  p.window = checked_window(window, p.shape, dtype);
  p.temperature = float(temperature.value_or(0));
  p.grad_query = call.contiguous_out(grad_query, "grad_query", query_sizes(p.shape), type);
  Tensor grad_key = torch::stable::new_empty(key, key_sizes(p.shape));
  Tensor grad_value = torch::stable::new_empty(key, key_sizes(p.shape));
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  launched(dmc::prepare_backward(p, dtype, call.stream()));
  return {grad_key, grad_value};
}

// Arguments of both kinds of step: new tokens, and the layer of the cache that they enter.
struct CacheCall : Call {
  dmc::DType dtype;
  ScalarType type;

  explicit CacheCall(const Tensor& query) : Call{query, "query"}, dtype(kernel_dtype(query, "query")), type(query.scalar_type()) {
    require(dtype != dmc::DType::kFloat, "query must be bfloat16 or float16; got float32");
  }

  int* ints(const Tensor& x, const char* name, const Sizes& sizes) const {
    return static_cast<int*>(contiguous_out(x, name, sizes, ScalarType::Int));
  }
  const int64_t* longs(const Tensor& x, const char* name, const Sizes& sizes) const {
    return static_cast<const int64_t*>(contiguous(x, name, sizes, ScalarType::Long));
  }

  // Sequences: as many as `slots`.
  dmc::NewTokens new_tokens(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& cos,
                            const std::optional<Tensor>& sin, const Tensor& slots, const Tensor& ok,
                            const Tensor& new_lengths, const Tensor& output, const Tensor& alpha, int64_t window,
                            double offset, bool interleaved, double scale) const {
    dmc::NewTokens in{};
    in.shape = shape_of(query, key);
    const int64_t b = slots.dim() == 1 ? slots.size(0) : 0, g = in.shape.kv_heads, d = in.shape.channels;
    in.query_stride = rows(query, "query", query_sizes(in.shape), type);
    in.key_stride = rows(key, "key", key_sizes(in.shape), type);
    in.value_stride = rows(value, "value", key_sizes(in.shape), type);
    in.output_stride = rows(output, "output", query_sizes(in.shape), type);
    in.query = query.const_data_ptr();
    in.key = key.const_data_ptr();
    in.value = value.const_data_ptr();
    in.output = output.mutable_data_ptr();
    matches(alpha, "alpha", scalar_sizes(in.shape), ScalarType::Float);
    in.alpha = static_cast<float*>(alpha.mutable_data_ptr());
    in.alpha_stride = {alpha.stride(0), alpha.stride(1), alpha.stride(2)};
    require(cos.has_value() == sin.has_value(), "cos and sin must be given together");
    if (cos) {
      require(cos->dim() == 2 && 2 * cos->size(1) <= d, "cos must be [positions, pairs] with at most ", d / 2,
              " pairs; got ", text(cos->sizes()));
      const Sizes sizes{cos->size(0), cos->size(1)};
      in.rotary.cos = floats(*cos, "cos", sizes);
      in.rotary.sin = floats(*sin, "sin", sizes);
      in.rotary.stride.token = cos->size(1);
      in.rotary.pairs = int(cos->size(1));
    }
    in.rotary.interleaved = interleaved;
    require(window >= 0, "window must be 0 (no limit) or a number of tokens; got ", window);
    in.window = int(window);
    in.offset = float(offset);
    in.scale = float(scale);
    in.slots = longs(slots, "slots", {b});
    in.ok = static_cast<bool*>(contiguous_out(ok, "ok", {}, ScalarType::Bool));
    in.new_lengths = ints(new_lengths, "new_lengths", {b, g});
    return in;
  }

  dmc::PagedLayer layer(const dmc::NewTokens& in, const Tensor& pages, const std::optional<Tensor>& scales,
                        const Tensor& table, const Tensor& lengths, const Tensor& tokens, const std::optional<Tensor>& recent,
                        const std::optional<Tensor>& recent_weights, const std::optional<Tensor>& mean,
                        const std::optional<Tensor>& total, const std::optional<Tensor>& steps) const {
    dmc::PagedLayer cache{};
    const int64_t g = in.shape.kv_heads, d = in.shape.channels;
    require(table.dim() == 3, "table must be [slots, KV heads, pages]; got ", text(table.sizes()));
    const int64_t s = table.size(0), held = table.size(2);
    cache.pages = contiguous_out(pages, "pages", {pages.size(0), 2, dmc::kPageEntries, d}, scales ? ScalarType::Float8_e4m3fn : type);
    cache.rows = pages.size(0) * 2 * dmc::kPageEntries;
    if (scales)
      cache.scales = static_cast<float*>(
          contiguous_out(*scales, "scales", {pages.size(0), 2, dmc::kPageEntries}, ScalarType::Float));
    cache.table = ints(table, "table", {s, g, held});
    cache.max_pages = int(held);
    cache.lengths = ints(lengths, "lengths", {s, g});
    cache.tokens = longs(tokens, "tokens", {s});
    if (in.window) {
      require(recent && recent_weights, "a window needs recent and recent_weights");
      cache.recent_tokens = (in.window - 1 + dmc::kMaxNewTokens + 3) / 4 * 4;
      cache.recent = contiguous_out(*recent, "recent", {s, g, cache.recent_tokens, 2, d}, type);
      cache.recent_weights = static_cast<float*>(
          contiguous_out(*recent_weights, "recent_weights", {s, g, cache.recent_tokens}, ScalarType::Float));
    } else {
      require(mean && total && steps, "window 0 needs mean, total and steps");
      cache.mean = static_cast<float*>(contiguous_out(*mean, "mean", {2, s, g, 2, d}, ScalarType::Float));
      cache.total = static_cast<float*>(contiguous_out(*total, "total", {2, s, g}, ScalarType::Float));
      cache.steps = longs(*steps, "steps", {s});
      cache.state_stride = s * g;
    }
    return cache;
  }
};

void paged_attention(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> cos,
                     std::optional<Tensor> sin, const Tensor& slots, Tensor ok, Tensor new_lengths, Tensor output,
                     Tensor alpha, int64_t window, double offset, bool interleaved, double scale, Tensor pages,
                     std::optional<Tensor> scales, Tensor table, const Tensor& lengths, const Tensor& tokens, std::optional<Tensor> recent,
                     std::optional<Tensor> recent_weights, std::optional<Tensor> mean, std::optional<Tensor> total,
                     std::optional<Tensor> steps, const Tensor& first_unit, const Tensor& first_head, Tensor arrived) {
  const CacheCall call(query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  dmc::PagedAttention p{};
  p.in = call.new_tokens(query, key, value, cos, sin, slots, ok, new_lengths, output, alpha, window, offset, interleaved, scale);
  p.cache = call.layer(p.in, pages, scales, table, lengths, tokens, recent, recent_weights, mean, total, steps);
  const auto& shape = p.in.shape;
  require(shape.tokens <= dmc::kMaxNewTokens, "query has ", shape.tokens, " new tokens; a step takes ", dmc::kMaxNewTokens);
  require(slots.size(0) == shape.batch, "slots must be [", shape.batch, "]; got ", text(slots.sizes()));

  const int64_t heads = int64_t(shape.batch) * shape.kv_heads, tiles = (int64_t(shape.tokens) * shape.group + 15) / 16;
  require(first_head.dim() == 1 && first_head.size(0) > 0, "first_head must be [workers]; got ", text(first_head.sizes()));
  p.workers = int(first_head.size(0));
  p.first_head = call.ints(first_head, "first_head", {p.workers});
  p.first_unit = call.ints(first_unit, "first_unit", {heads + 1});
  const int64_t counters = heads * tiles;
  require(arrived.dim() == 1 && arrived.size(0) >= counters, "arrived must hold ", counters, " numbers; got ", text(arrived.sizes()));
  p.arrived = call.ints(arrived, "arrived", {arrived.size(0)});
  Tensor partial = torch::stable::new_empty(query, {p.workers, 2, tiles, 16, shape.channels + 2}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  launched(dmc::paged_attention(p, call.dtype, call.stream()));
}

void paged_chunks(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> cos,
                  std::optional<Tensor> sin, const Tensor& slots, Tensor ok, Tensor new_lengths, Tensor output,
                  Tensor alpha, int64_t window, double offset, bool interleaved, double scale, Tensor pages,
                  std::optional<Tensor> scales, Tensor table, const Tensor& lengths, const Tensor& tokens, std::optional<Tensor> recent,
                  std::optional<Tensor> recent_weights, std::optional<Tensor> mean, std::optional<Tensor> total,
                  std::optional<Tensor> steps, const Tensor& first_token, int64_t longest, Tensor free, Tensor free_count,
                  std::optional<Tensor> last, std::optional<Tensor> last_weights) {
  const CacheCall call(query);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  dmc::PagedChunks p{};
  p.in = call.new_tokens(query, key, value, cos, sin, slots, ok, new_lengths, output, alpha, window, offset, interleaved, scale);
  p.cache = call.layer(p.in, pages, scales, table, lengths, tokens, recent, recent_weights, mean, total, steps);
  auto& shape = p.in.shape;
  require(shape.batch == 1, "query must hold the chunks one after the other, [tokens, 1, heads, channels]; got ",
          text(query.sizes()));
  const int64_t c = slots.size(0), n = shape.tokens, g = shape.kv_heads, d = shape.channels;
  shape.batch = int(c);
  for (Strides* stride : {&p.in.query_stride, &p.in.key_stride, &p.in.value_stride, &p.in.output_stride, &p.in.alpha_stride})
    stride->batch = 0;
  require(n * shape.kv_heads * shape.group < int64_t(1) << 31, "query holds too many tokens at once for 32-bit indices: ", n, " of ",
          shape.kv_heads * shape.group, " heads; enter the prompts in shorter chunks");
  require(longest > 0 && longest <= n, "longest must be 1 to ", n, "; got ", longest);
  p.longest = int(longest);
  p.first_token = call.ints(first_token, "first_token", {c + 1});
  require(free.dim() == 1, "free must be [pages + 1]; got ", text(free.sizes()));
  p.free = call.ints(free, "free", {pages.size(0) + 1});
  p.free_count = static_cast<int64_t*>(call.contiguous_out(free_count, "free_count", {}, ScalarType::Long));
  if (window > 1) {
    require(last && last_weights, "a window needs last and last_weights");
    p.last = call.contiguous_out(*last, "last", {c, g, window - 1, 2, d}, call.type);
    p.last_weights = static_cast<float*>(call.contiguous_out(*last_weights, "last_weights", {c, g, window - 1}, ScalarType::Float));
  }
  Tensor entry = torch::stable::new_empty(query, {n, g}, ScalarType::Int);
  Tensor weight = torch::stable::new_empty(query, {n, g}, ScalarType::Float);
  Tensor own = torch::stable::new_empty(query, {n, g, 2, d});
  Tensor before = torch::stable::new_empty(query, {c, g, (longest + dmc::kDecideBlock - 1) / dmc::kDecideBlock}, ScalarType::Int);
  p.entry = static_cast<int*>(entry.mutable_data_ptr());
  p.before = static_cast<int*>(before.mutable_data_ptr());
  p.weight = static_cast<float*>(weight.mutable_data_ptr());
  Tensor own_score = torch::stable::new_empty(query, {n, shape.kv_heads * shape.group}, ScalarType::Float);
  p.own = own.mutable_data_ptr();
  p.own_score = static_cast<float*>(own_score.mutable_data_ptr());
  launched(dmc::paged_chunks(p, call.dtype, call.stream()));
}

int64_t max_window(ScalarType dtype, int64_t channels) {
  switch (dtype) {
    case ScalarType::BFloat16: return dmc::max_window(dmc::DType::kBFloat16, int(channels));
    case ScalarType::Half: return dmc::max_window(dmc::DType::kHalf, int(channels));
    case ScalarType::Float: return dmc::max_window(dmc::DType::kFloat, int(channels));
    default: return 0;
  }
}

int64_t paged_workers(ScalarType dtype, int64_t channels, bool scaled) {
  switch (dtype) {
    case ScalarType::BFloat16: return dmc::paged_workers(dmc::DType::kBFloat16, int(channels), scaled);
    case ScalarType::Half: return dmc::paged_workers(dmc::DType::kHalf, int(channels), scaled);
    default: return 0;
  }
}

int64_t page_entries() { return dmc::kPageEntries; }

}  // namespace

STABLE_TORCH_LIBRARY(megatron_dmc, m) {
  m.def(
      "prepare(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor? noise, Tensor? noise_key, "
      "int noise_stream, int noise_first_head, int window, float offset, float? temperature, bool interleaved, "
      "float scale, float query_channel, int noise_first_token=0, int noise_stride=0, int noise_sequences=0, "
      "float noise_scale=1) -> (Tensor attention_query, Tensor attention_key, Tensor attention_value, Tensor diagonal, "
      "Tensor alpha, Tensor weight)");
  m.def("merge_past_(Tensor(a!) output, Tensor(b!) logsumexp, Tensor past, Tensor past_logsumexp) -> ()");
  m.def(
      "merge_diagonal_(Tensor(a!) output, Tensor(b!) logsumexp, Tensor diagonal, Tensor attention_key, "
      "Tensor attention_value, float bias_per_channel) -> ()");
  m.def(
      "merge_diagonal_backward_(Tensor grad_output, Tensor output, Tensor logsumexp, Tensor diagonal, "
      "Tensor attention_query, Tensor attention_key, Tensor attention_value, Tensor(a!) grad_query, "
      "Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor? cos, Tensor? sin, bool interleaved, float scale, "
      "float bias_per_channel) -> Tensor grad_bias");
  m.def(
      "prepare_backward_(Tensor(a!) grad_query, Tensor grad_merged_key, Tensor grad_merged_value, Tensor grad_bias, "
      "Tensor? grad_alpha, Tensor key, Tensor value, Tensor alpha, Tensor weight, int window, float? temperature) "
      "-> (Tensor grad_key, Tensor grad_value)");
#define NEW_TOKENS                                                                                           \
  "Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor slots, Tensor(a!) ok, "          \
  "Tensor(b!) new_lengths, Tensor(c!) output, Tensor(d!) alpha, int window, float offset, bool interleaved, " \
  "float scale, "
#define CACHE_LAYER                                                                                          \
  "Tensor(e!) pages, Tensor(n!)? scales, Tensor(f!) table, Tensor lengths, Tensor tokens, Tensor(g!)? recent, " \
  "Tensor(h!)? recent_weights, Tensor(i!)? mean, Tensor(j!)? total, Tensor? steps, "
  m.def("paged_attention_(" NEW_TOKENS CACHE_LAYER "Tensor first_unit, Tensor first_head, Tensor(k!) arrived) -> ()");
  m.def("paged_chunks_(" NEW_TOKENS CACHE_LAYER
        "Tensor first_token, int longest, Tensor free, Tensor(k!) free_count, Tensor(l!)? last, "
        "Tensor(m!)? last_weights) -> ()");
  m.def("max_window(ScalarType dtype, int channels) -> int");
  m.def("paged_workers(ScalarType dtype, int channels, bool scaled) -> int");
  m.def("page_entries() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_dmc, CUDA, m) {
  m.impl("prepare", TORCH_BOX(&prepare));
  m.impl("merge_past_", TORCH_BOX(&merge_past));
  m.impl("merge_diagonal_", TORCH_BOX(&merge_diagonal));
  m.impl("merge_diagonal_backward_", TORCH_BOX(&merge_diagonal_backward));
  m.impl("prepare_backward_", TORCH_BOX(&prepare_backward));
  m.impl("paged_attention_", TORCH_BOX(&paged_attention));
  m.impl("paged_chunks_", TORCH_BOX(&paged_chunks));
}

STABLE_TORCH_LIBRARY_IMPL(megatron_dmc, CompositeExplicitAutograd, m) {
  m.impl("max_window", TORCH_BOX(&max_window));
  m.impl("paged_workers", TORCH_BOX(&paged_workers));
  m.impl("page_entries", TORCH_BOX(&page_entries));
}
