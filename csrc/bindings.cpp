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
    double query_channel) {
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

std::tuple<Tensor, Tensor> paged_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> cos, std::optional<Tensor> sin,
    Tensor pages, const Tensor& table, const Tensor& lengths, const Tensor& tokens, std::optional<Tensor> recent,
    std::optional<Tensor> recent_weights, std::optional<Tensor> mean, std::optional<Tensor> total,
    std::optional<Tensor> steps, const Tensor& slots, const Tensor& ok, Tensor new_lengths, const Tensor& first_unit,
    const Tensor& first_head, Tensor arrived, int64_t window, double offset, bool interleaved, double scale) {
  const Call call{query, "query"};
  dmc::PagedAttention p{};
  p.shape = shape_of(query, key);
  const ScalarType type = query.scalar_type();
  const dmc::DType dtype = kernel_dtype(query, "query");
  require(dtype != dmc::DType::kFloat, "query must be bfloat16 or float16; got float32");
  require(p.shape.tokens <= dmc::kMaxNewTokens, "query has ", p.shape.tokens, " new tokens; a step takes ", dmc::kMaxNewTokens);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  p.query_stride = call.rows(query, "query", query_sizes(p.shape), type);
  p.key_stride = call.rows(key, "key", key_sizes(p.shape), type);
  p.value_stride = call.rows(value, "value", key_sizes(p.shape), type);
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();

  const int64_t b = p.shape.batch, g = p.shape.kv_heads, d = p.shape.channels;
  require(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  if (cos) {
    require(cos->dim() == 2 && 2 * cos->size(1) <= d, "cos must be [positions, pairs] with at most ", d / 2,
            " pairs; got ", text(cos->sizes()));
    const Sizes sizes{cos->size(0), cos->size(1)};
    p.rotary.cos = call.floats(*cos, "cos", sizes);
    p.rotary.sin = call.floats(*sin, "sin", sizes);
    p.rotary.stride.token = cos->size(1);
    p.rotary.pairs = int(cos->size(1));
  }
  p.rotary.interleaved = interleaved;
  p.window = int(window);
  p.offset = float(offset);
  p.scale = float(scale);

  require(table.dim() == 3, "table must be [slots, KV heads, pages]; got ", text(table.sizes()));
  const int64_t s = table.size(0), held = table.size(2);
  const auto ints = [&](const Tensor& x, const char* name, const Sizes& sizes) {
    return static_cast<const int*>(call.contiguous(x, name, sizes, ScalarType::Int));
  };
  const auto longs = [&](const Tensor& x, const char* name, const Sizes& sizes) {
    return static_cast<const int64_t*>(call.contiguous(x, name, sizes, ScalarType::Long));
  };
  p.pages = call.contiguous_out(pages, "pages", {pages.size(0), 2, dmc::kPageEntries, d}, type);
  p.table = ints(table, "table", {s, g, held});
  p.max_pages = int(held);
  p.lengths = ints(lengths, "lengths", {s, g});
  p.tokens = longs(tokens, "tokens", {s});
  p.slots = longs(slots, "slots", {b});
  p.ok = static_cast<const bool*>(call.contiguous(ok, "ok", {}, ScalarType::Bool));
  p.new_lengths = static_cast<int*>(call.contiguous_out(new_lengths, "new_lengths", {b, g}, ScalarType::Int));
  require(window >= 0, "window must be 0 (no limit) or a number of tokens; got ", window);
  if (window) {
    require(recent && recent_weights, "a window needs recent and recent_weights");
    p.recent_tokens = int(window) - 1 + dmc::kMaxNewTokens;
    p.recent = call.contiguous_out(*recent, "recent", {s, g, p.recent_tokens, 2, d}, type);
    p.recent_weights = static_cast<float*>(
        call.contiguous_out(*recent_weights, "recent_weights", {s, g, p.recent_tokens}, ScalarType::Float));
  } else {
    require(mean && total && steps, "window 0 needs mean, total and steps");
    p.mean = static_cast<float*>(call.contiguous_out(*mean, "mean", {2, s, g, 2, d}, ScalarType::Float));
    p.total = static_cast<float*>(call.contiguous_out(*total, "total", {2, s, g}, ScalarType::Float));
    p.steps = longs(*steps, "steps", {s});
    p.state_stride = s * g;
  }

  const int64_t tiles = (int64_t(p.shape.tokens) * p.shape.group + 15) / 16;
  require(first_head.dim() == 1 && first_head.size(0) > 0, "first_head must be [workers]; got ", text(first_head.sizes()));
  p.workers = int(first_head.size(0));
  p.first_head = ints(first_head, "first_head", {p.workers});
  p.first_unit = ints(first_unit, "first_unit", {b * g + 1});
  require(arrived.dim() == 1 && arrived.size(0) >= b * g * tiles, "arrived must hold ", b * g * tiles, " numbers; got ",
          text(arrived.sizes()));
  p.arrived = static_cast<int*>(call.contiguous_out(arrived, "arrived", {arrived.size(0)}, ScalarType::Int));
  Tensor partial = torch::stable::new_empty(query, {p.workers, 2, tiles, 16, d + 2}, ScalarType::Float);
  Tensor output = torch::stable::new_empty(query, query_sizes(p.shape));
  Tensor alpha = torch::stable::new_empty(query, scalar_sizes(p.shape), ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  p.output = output.mutable_data_ptr();
  p.alpha = static_cast<float*>(alpha.mutable_data_ptr());
  launched(dmc::paged_attention(p, dtype, call.stream()));
  return {output, alpha};
}

int64_t max_window(ScalarType dtype, int64_t channels) {
  switch (dtype) {
    case ScalarType::BFloat16: return dmc::max_window(dmc::DType::kBFloat16, int(channels));
    case ScalarType::Half: return dmc::max_window(dmc::DType::kHalf, int(channels));
    case ScalarType::Float: return dmc::max_window(dmc::DType::kFloat, int(channels));
    default: return 0;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(megatron_dmc, m) {
  m.def(
      "prepare(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor? noise, Tensor? noise_key, "
      "int noise_stream, int noise_first_head, int window, float offset, float? temperature, bool interleaved, "
      "float scale, float query_channel) -> (Tensor attention_query, Tensor attention_key, Tensor attention_value, "
      "Tensor diagonal, Tensor alpha, Tensor weight)");
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
  m.def(
      "paged_attention_(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor(a!) pages, Tensor table, "
      "Tensor lengths, Tensor tokens, Tensor(b!)? recent, Tensor(c!)? recent_weights, Tensor(d!)? mean, "
      "Tensor(e!)? total, Tensor? steps, Tensor slots, Tensor ok, Tensor(f!) new_lengths, Tensor first_unit, "
      "Tensor first_head, Tensor(g!) arrived, int window, float offset, bool interleaved, float scale) "
      "-> (Tensor output, Tensor alpha)");
  m.def("max_window(ScalarType dtype, int channels) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_dmc, CUDA, m) {
  m.impl("prepare", TORCH_BOX(&prepare));
  m.impl("merge_diagonal_", TORCH_BOX(&merge_diagonal));
  m.impl("merge_diagonal_backward_", TORCH_BOX(&merge_diagonal_backward));
  m.impl("prepare_backward_", TORCH_BOX(&prepare_backward));
  m.impl("paged_attention_", TORCH_BOX(&paged_attention));
}

STABLE_TORCH_LIBRARY_IMPL(megatron_dmc, CompositeExplicitAutograd, m) { m.impl("max_window", TORCH_BOX(&max_window)); }
