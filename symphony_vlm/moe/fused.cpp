// The experts of one sparse layer on a CPU: fp32, gated by SiLU, without biases. `fused.py` says what for, and builds it.
//
// Shape letters as in `segments.py`: T tokens, D input size, F expert hidden size, H = 2F, O output size, E experts, K
// experts per token, N = T * K routed tokens sorted by expert, n of them one expert's.
//
// Between the matrix products everything is one pass over an expert's rows, in buffers that all experts share and that
// therefore stay in the cache. For the backward pass the results of the first products are kept and nothing else:
// tokens are fetched and activated again. A token's results are added in the order of its experts' numbers, by one
// thread, so two runs have the same bits.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kGrain = 16;  // rows of one expert that are worth a thread

// Which routed tokens are whose, in their old order: a counting sort.
struct Routing {
  std::vector<int64_t> first;   // of each expert's routed tokens, and the end: [E + 1]
  std::vector<int64_t> routed;  // which of the flat T * K it is: [N]
  int64_t num_chosen;
  int64_t most;  // tokens of one expert

  Routing(const Tensor& indices_TK, int64_t num_experts)
      : first(num_experts + 1), routed(indices_TK.numel()), num_chosen(indices_TK.size(1)), most(0) {
    const int64_t* indices = indices_TK.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < indices_TK.numel(); ++i) {
      TORCH_CHECK_INDEX(
          indices[i] >= 0 && indices[i] < num_experts, "expert ", indices[i], " of ", num_experts, " does not exist");
      ++first[indices[i] + 1];
    }
    most = *std::max_element(first.begin(), first.end());
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < indices_TK.numel(); ++i) {
      int64_t& place = next[indices[i]];
      TORCH_CHECK_VALUE(
          place == first[indices[i]] || token(place - 1) != i / num_chosen,
          "token ", i / num_chosen, " has expert ", indices[i], " twice");
      routed[place++] = i;
    }
  }

  int64_t token(int64_t row) const {
    return routed[row] / num_chosen;
  }
};

template <typename Function>
void for_rows(int64_t n, const Function& function) {
  at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      function(i);
    }
  });
}

void fetch(const Tensor& x_TD, const Routing& routing, int64_t start, const Tensor& x_nD) {
  const int64_t D = x_TD.size(1);
  const float* from = x_TD.const_data_ptr<float>();
  float* to = x_nD.mutable_data_ptr<float>();
  for_rows(x_nD.size(0), [&](int64_t i) {
    std::memcpy(to + i * D, from + routing.token(start + i) * D, D * sizeof(float));
  });
}

// Adds rows, weighted or not, to those of their tokens. An expert has a token once, so threads do not meet.
void add_rows(const Tensor& y_nO, const float* weights, const Routing& routing, int64_t start, Tensor& y_TO) {
  const int64_t O = y_TO.size(1);
  const float* from = y_nO.const_data_ptr<float>();
  float* to = y_TO.mutable_data_ptr<float>();
  for_rows(y_nO.size(0), [&](int64_t i) {
    const Vec weight(weights ? weights[routing.routed[start + i]] : 1.0f);
    float* row = to + routing.token(start + i) * O;
    at::vec::map2<float>([&](Vec sum, Vec y) { return sum + weight * y; }, row, row, from + i * O, O);
  });
}

Vec sigmoid(const Vec& x) {
  return Vec(1.0f) / (Vec(1.0f) + x.neg().exp());
}

// The first F of each row, activated, times the other F.
void activate(const Tensor& hidden_nH, const Tensor& active_nF) {
  const int64_t F = active_nF.size(1);
  const float* hidden = hidden_nH.const_data_ptr<float>();
  float* active = active_nF.mutable_data_ptr<float>();
  for_rows(active_nF.size(0), [&](int64_t i) {
    const float* gate = hidden + i * 2 * F;
    at::vec::map2<float>([](Vec g, Vec u) { return g * sigmoid(g) * u; }, active + i * F, gate, gate + F, F);
  });
}

// From the gradient of the activated values, not yet weighted: the gradients of a row's weight and of its hidden
// values, and its activated values times its weight, which the second weights' gradient needs.
float activate_backward_row(
    const float* grad, const float* hidden, float weight, int64_t F, float* active, float* grad_hidden) {
  Vec sum(0.0f);
  const Vec w(weight), one(1.0f);
  for (int64_t j = 0; j < F; j += Vec::size()) {
    const int64_t count = std::min<int64_t>(Vec::size(), F - j);
    const Vec d = Vec::loadu(grad + j, count), g = Vec::loadu(hidden + j, count), u = Vec::loadu(hidden + F + j, count);
    const Vec s = sigmoid(g), silu = g * s, a = silu * u, dw = d * w;
    // Where nothing was loaded there are zeros.
    sum = sum + d * a;
    (a * w).store(active + j, count);
    (dw * u * s * (one + g * (one - s))).store(grad_hidden + j, count);
    (dw * silu).store(grad_hidden + F + j, count);
  }
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum);
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weights, const Tensor& indices, const Tensor& up, const Tensor& down, bool keep) {
  const Tensor x_TD = x.contiguous(), weights_TK = weights.contiguous(), indices_TK = indices.contiguous();
  const Tensor up_EHD = up.contiguous(), down_EOF = down.contiguous();
  const int64_t E = up.size(0), H = up.size(1), D = up.size(2), O = down.size(1), F = down.size(2);
  const Routing routing(indices_TK, E);
  Tensor y_TO = at::zeros({x.size(0), O}, x.options());
  const Tensor hidden_NH = at::empty({keep ? indices.numel() : routing.most, H}, x.options());
  const Tensor rows_mD = at::empty({routing.most, D}, x.options());
  const Tensor active_mF = at::empty({routing.most, F}, x.options());
  const Tensor y_mO = at::empty({routing.most, O}, x.options());
  for (int64_t e = 0; e < E; ++e) {
    const int64_t start = routing.first[e], n = routing.first[e + 1] - start;
    if (n == 0) {
      continue;
    }
    Tensor x_nD = rows_mD.narrow(0, 0, n), active_nF = active_mF.narrow(0, 0, n), y_nO = y_mO.narrow(0, 0, n);
    Tensor hidden_nH = hidden_NH.narrow(0, keep ? start : 0, n);
    fetch(x_TD, routing, start, x_nD);
    at::mm_out(hidden_nH, x_nD, up_EHD[e].t());
    activate(hidden_nH, active_nF);
    at::mm_out(y_nO, active_nF, down_EOF[e].t());
    add_rows(y_nO, weights_TK.const_data_ptr<float>(), routing, start, y_TO);
  }
  return {y_TO, hidden_NH};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& indices,
    const Tensor& up,
    const Tensor& down,
    const Tensor& hidden_NH,
    bool needs_x,
    bool needs_up,
    bool needs_down) {
  const Tensor grad_TO = grad.contiguous(), x_TD = x.contiguous(), weights_TK = weights.contiguous();
  const Tensor indices_TK = indices.contiguous(), up_EHD = up.contiguous(), down_EOF = down.contiguous();
  const int64_t E = up.size(0), H = up.size(1), D = up.size(2), O = down.size(1), F = down.size(2);
  const Routing routing(indices_TK, E);
  const auto rows_of = [&](int64_t size) { return at::empty({routing.most, size}, x.options()); };
  const Tensor rows_mD = rows_of(D), grad_y_mO = rows_of(O), grad_active_mF = rows_of(F), active_mF = rows_of(F);
  const Tensor grad_hidden_mH = rows_of(H), grad_x_mD = rows_of(D);
  Tensor grad_x_TD = needs_x ? at::zeros_like(x_TD) : Tensor(), grad_weights_TK = at::empty_like(weights_TK);
  Tensor grad_up_EHD = needs_up ? at::empty_like(up_EHD) : Tensor();
  Tensor grad_down_EOF = needs_down ? at::empty_like(down_EOF) : Tensor();
  const float* weight = weights_TK.const_data_ptr<float>();
  float* grad_weight = grad_weights_TK.mutable_data_ptr<float>();
  for (int64_t e = 0; e < E; ++e) {
    const int64_t start = routing.first[e], n = routing.first[e + 1] - start;
    const auto of = [n](const Tensor& rows) { return rows.narrow(0, 0, n); };
    const Tensor x_nD = of(rows_mD), grad_y_nO = of(grad_y_mO), active_nF = of(active_mF);
    const Tensor grad_hidden_nH = of(grad_hidden_mH);
    Tensor grad_active_nF = of(grad_active_mF), grad_x_nD = of(grad_x_mD);
    fetch(grad_TO, routing, start, grad_y_nO);
    at::mm_out(grad_active_nF, grad_y_nO, down_EOF[e]);
    const float* hidden = hidden_NH.const_data_ptr<float>() + start * H;
    const float* grad_active = grad_active_nF.const_data_ptr<float>();
    float* active = active_nF.mutable_data_ptr<float>();
    float* grad_hidden = grad_hidden_nH.mutable_data_ptr<float>();
    for_rows(n, [&](int64_t i) {
      const int64_t routed = routing.routed[start + i];
      grad_weight[routed] = activate_backward_row(
          grad_active + i * F, hidden + i * H, weight[routed], F, active + i * F, grad_hidden + i * H);
    });
    // Of an expert without tokens the products have no terms, and its gradients are zero.
    if (needs_down) {
      Tensor grad_down_OF = grad_down_EOF[e];
      at::mm_out(grad_down_OF, grad_y_nO.t(), active_nF);
    }
    if (needs_up) {
      Tensor grad_up_HD = grad_up_EHD[e];
      fetch(x_TD, routing, start, x_nD);
      at::mm_out(grad_up_HD, grad_hidden_nH.t(), x_nD);
    }
    if (needs_x) {
      at::mm_out(grad_x_nD, grad_hidden_nH, up_EHD[e]);
      add_rows(grad_x_nD, nullptr, routing, start, grad_x_TD);
    }
  }
  return {grad_x_TD, grad_weights_TK, grad_up_EHD, grad_down_EOF};
}

}  // namespace

TORCH_LIBRARY(symphony_vlm, library) {
  library.def("experts(Tensor x, Tensor weights, Tensor indices, Tensor up, Tensor down, bool keep) -> (Tensor, Tensor)");
  library.def(
      "experts_backward(Tensor grad, Tensor x, Tensor weights, Tensor indices, Tensor up, Tensor down, Tensor hidden, "
      "bool needs_x, bool needs_up, bool needs_down) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(symphony_vlm, CPU, library) {
  library.impl("experts", &forward);
  library.impl("experts_backward", &backward);
}
