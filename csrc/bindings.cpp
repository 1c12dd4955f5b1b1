// hpsafety._C: the schemas of the C++ kernels, and what is not a tensor op (build information).
//
// The kernels themselves live in csrc/cpu/<op>.cpp, are built once per CPU capability into hpsafety._cpu_*, and
// register under these schemas when hpsafety/ops/backends.py loads the library that fits the running CPU.
// Every schema is functional: kernels return fresh contiguous tensors. Names that end in _ write to what they are
// given and are called only where no gradient flows.

#include <pybind11/pybind11.h>
#include <torch/library.h>

TORCH_LIBRARY(hpsafety_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def("rms_norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor rstd)"
        " -> (Tensor grad_x, Tensor grad_weight)");
  m.def("rope_(Tensor q, Tensor k, Tensor? v, Tensor positions, Tensor cos, Tensor sin, bool inverse,"
        " Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!)? v_out) -> ()");
  m.def("sample(Tensor logits, float temperature, float top_p, int top_k, Tensor seeds, Tensor positions)"
        " -> (Tensor tokens, Tensor logprobs)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate_up) -> (Tensor grad_gate_up, Tensor y)");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor segments, float softmax_scale)"
        " -> (Tensor out, Tensor lse)");
  m.def("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor segments,"
        " float softmax_scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor context_lens,"
        " Tensor? prefix_table, Tensor? prefix_lens, Tensor? group_of, float softmax_scale, bool sequential)"
        " -> Tensor");
  m.def("linear_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy)"
        " -> (Tensor logprobs, Tensor norm, Tensor entropy)");
  m.def("linear_logprob_backward(Tensor grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor targets,"
        " Tensor norm, Tensor? entropy, float temperature, bool need_hidden, bool need_weight)"
        " -> (Tensor grad_hidden, Tensor grad_weight)");
  m.def("linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor row_weights, bool need_hidden,"
        " bool need_weight) -> (Tensor loss, Tensor logprobs, Tensor grad_hidden, Tensor grad_weight)");
  m.def("ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor values, Tensor old_values,"
        " Tensor returns, Tensor mask, Tensor? entropy, float clip_ratio, float value_clip, float value_coef,"
        " float entropy_coef, float? num_tokens, Tensor? num_tokens_tensor)"
        " -> (Tensor loss, Tensor stats, Tensor grads)");
  m.def("gae(Tensor rewards, Tensor values, Tensor cu_responses, float gamma, float lam)"
        " -> (Tensor advantages, Tensor returns)");
  m.def("reward_score(Tensor hidden_safety, Tensor hidden_helpful, Tensor last_rows, Tensor head_safety,"
        " Tensor head_helpful, Tensor is_safety, Tensor cu_groups, Tensor? norm_safety, Tensor? norm_helpful,"
        " float eps, float threshold)"
        " -> (Tensor r_safety, Tensor r_helpful, Tensor combined, Tensor whitened, Tensor best_of_group)");
  m.def("pair_loss(Tensor chosen, Tensor rejected, Tensor? margin, float margin_value, Tensor? safe_chosen,"
        " Tensor? safe_rejected, float aux_weight, float? num_pairs, Tensor? num_pairs_tensor)"
        " -> (Tensor loss, Tensor per_pair, Tensor grads)");
  m.def("distill_loss(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight,"
        " str kind, float temperature) -> (Tensor loss, Tensor norm)");
  m.def("distill_loss_backward(Tensor grad, Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden,"
        " Tensor teacher_weight, Tensor norm, str kind, float temperature, bool need_hidden, bool need_weight)"
        " -> (Tensor grad_hidden, Tensor grad_weight)");
  m.def("accumulate_(Tensor(a!) total, Tensor grad) -> ()");
  m.def("adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, float lr,"
        " float beta1, float beta2, float eps, float weight_decay, Tensor(d!) step, Tensor grad_norm,"
        " float max_norm, Tensor(e!)[] copies) -> ()");
  m.def("grad_norm_sq(Tensor[] grads) -> Tensor");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "hpsafety: operator schemas and build information";
  m.attr("compiler") = __VERSION__;
  m.attr("built") = __DATE__;
}
