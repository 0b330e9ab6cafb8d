// driver REQUEST REPLY [REQUEST REPLY]...: runs the launchers of csrc/cuda, kernels and all, on the CPU.
//
// Each request is run once per number in its array `orders` (0: threads by index, else a random order of that
// seed); runs that differ in a bit end the process with an error. The reply is the output arrays one after another.
#include <cuda_runtime.h>

#include <exception>

#include "broken.h"
#include "di4c/api.h"
#include "request.h"

namespace {

using namespace di4c;

Logits logits(const Request& r, const std::string& name) {
  if (!r.get<void>(name)) return {nullptr, kFloat32, 0, 0, 0};
  return {r.get<void>(name), static_cast<DType>(r.integer(name + "_dtype")), r.integer(name + "_stride_b"),
          r.integer(name + "_stride_l"), r.integer(name + "_stride_d")};
}

template <class Args>
void shape(const Request& r, Args& a) {
  a.B = r.integer("B"), a.L = r.integer("L"), a.D = r.integer("D"), a.S = r.integer("S");
  a.logits = logits(r, "logits");
  a.weight = r.get<const float>("weight");
}

void run(const Request& r, int device) {
  const std::string op = r.string("op");
  if (op == "random_bits") {
    cuda::random_bits({r.get<int64_t>("keys"), r.get<int64_t>("out"), r.integer("B"), r.integer("N"),
                       static_cast<uint32_t>(r.number("stream"))},
                      device, nullptr);
  } else if (op == "sample") {
    SampleArgs a{};
    a.logits = logits(r, "logits");
    a.keys = r.get<int64_t>("keys"), a.x_t = r.get<int64_t>("x_t"), a.unmask_prob = r.get<double>("unmask_prob");
    a.mask_id = r.integer("mask_id"), a.tokens = r.get<int64_t>("tokens"), a.log_prob = r.get<float>("log_prob");
    a.B = r.integer("B"), a.D = r.integer("D"), a.S = r.integer("S"), a.draws = r.integer("draws");
    a.stream = static_cast<uint32_t>(r.number("stream")), a.temperature = static_cast<float>(r.number("temperature"));
    cuda::sample(a, device, nullptr);
  } else if (op == "mixture_log_prob") {
    MixtureLogProbArgs a{};
    shape(r, a);
    a.K = r.integer("K"), a.tokens = r.get<int64_t>("tokens"), a.joint = r.get<float>("joint");
    a.correlation = r.get<float>("correlation"), a.lse = r.get<float>("lse"), a.share = r.get<float>("share");
    a.work = r.get<double>("work");
    cuda::mixture_log_prob(a, device, nullptr);
  } else if (op == "mixture_log_prob_backward") {
    MixtureLogProbBackwardArgs a{};
    shape(r, a);
    a.K = r.integer("K"), a.tokens = r.get<int64_t>("tokens"), a.lse = r.get<float>("lse");
    a.share = r.get<float>("share"), a.grad_joint = r.get<float>("grad_joint");
    a.grad_correlation = r.get<float>("grad_correlation"), a.grad = r.get<void>("grad");
    cuda::mixture_log_prob_backward(a, device, nullptr);
  } else if (op == "mixture_kl") {
    MixtureKlArgs a{};
    shape(r, a);
    a.T = r.integer("T"), a.target = logits(r, "target"), a.kl = r.get<float>("kl");
    a.lse_target = r.get<float>("lse_target"), a.lse = r.get<float>("lse"), a.pull = r.get<float>("pull");
    a.row = r.get<float>("row");
    cuda::mixture_kl(a, device, nullptr);
  } else if (op == "mixture_kl_backward") {
    MixtureKlBackwardArgs a{};
    shape(r, a);
    a.T = r.integer("T"), a.target = logits(r, "target"), a.lse_target = r.get<float>("lse_target");
    a.lse = r.get<float>("lse"), a.pull = r.get<float>("pull"), a.grad_kl = r.get<float>("grad_kl");
    a.grad = r.get<void>("grad");
    cuda::mixture_kl_backward(a, device, nullptr);
  } else if (op == "row_loss") {
    RowLossArgs a{};
    shape(r, a);
    a.kind = static_cast<RowLoss>(r.integer("kind")), a.target = logits(r, "target");
    a.tokens = r.get<int64_t>("tokens"), a.loss = r.get<float>("loss"), a.stats = r.get<float>("stats");
    a.row = r.get<float>("row");
    cuda::row_loss(a, device, nullptr);
  } else if (op == "row_loss_backward") {
    RowLossBackwardArgs a{};
    shape(r, a);
    a.kind = static_cast<RowLoss>(r.integer("kind")), a.target = logits(r, "target");
    a.tokens = r.get<int64_t>("tokens"), a.stats = r.get<float>("stats"), a.grad_loss = r.get<float>("grad_loss");
    a.grad = r.get<void>("grad");
    cuda::row_loss_backward(a, device, nullptr);
  } else if (!run_broken(op, r.get<int>("values"))) {
    simt::fail("no op is called %s", op.c_str());
  }
}

void answer(const char* request_path, const char* reply_path) {
  Request r(request_path);
  const int64_t* orders = r.get<int64_t>("orders");
  const int64_t count = r.integer("order_count");
  simt::wanted_device = static_cast<int>(r.integer("device"));
  simt::next_launch = static_cast<cudaError_t>(r.integer("launch_error"));
  std::vector<std::string> first;
  for (int64_t n = 0; n < count; ++n) {
    for (const Array& a : r.arrays())
      if (a.is_output) memset(a.data, 0xcd, a.bytes);  // whoever forgets to write is seen
    simt::set_order(static_cast<uint64_t>(orders[n]));
    run(r, simt::wanted_device);
    if (simt::device != 0 || simt::launches_off_device != 0) simt::fail("the device guard is broken");
    size_t i = 0;
    for (const Array& a : r.arrays()) {
      if (!a.is_output) continue;
      const std::string bytes(a.data, a.bytes);
      if (n == 0) {
        first.push_back(bytes);
      } else if (first[i++] != bytes) {
        simt::fail("%s depends on the order of the threads", a.name.c_str());
      }
    }
  }
  FILE* reply = fopen(reply_path, "wb");
  for (const std::string& bytes : first) fwrite(bytes.data(), 1, bytes.size(), reply);
  if (!reply || fclose(reply) != 0) simt::fail("cannot write %s", reply_path);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    for (int i = 1; i + 1 < argc; i += 2) answer(argv[i], argv[i + 1]);
  } catch (const std::exception& error) {
    fprintf(stderr, "error: %s\n", error.what());
    return 4;
  }
  return 0;
}
