// driver REQUEST REPLY [REQUEST REPLY]...: runs the launchers of csrc/cuda, kernels and all, on the CPU.
//
// Each request is run once per number in its array `orders` (0: threads by index, else a random order of that
// seed); runs that differ in a bit end the process with an error. The reply is the output arrays one after another.
#include <cuda_runtime.h>

#include <exception>

#include "broken.h"
#include "di4c/api.h"
#include "launch.cuh"
#include "request.h"

namespace {

using namespace di4c;

Logits logits(const Request& r, const std::string& name) {
  if (!r.get<void>(name)) return {nullptr, kFloat32, 0, 0, 0};
  return {r.get<void>(name), static_cast<DType>(r.integer(name + "_dtype")), r.integer(name + "_stride_b"),
          r.integer(name + "_stride_l"), r.integer(name + "_stride_d")};
}

Sequences sequences(const Request& r, const std::string& name) {
  if (!r.get<int64_t>(name)) return {nullptr, 0, 0, 0};
  return {r.get<int64_t>(name), r.integer(name + "_stride_b"), r.integer(name + "_stride_k"),
          r.integer(name + "_stride_d")};
}

template <class Args>
void shape(const Request& r, Args& a) {
  a.B = r.integer("B"), a.L = r.integer("L"), a.D = r.integer("D"), a.S = r.integer("S");
  a.logits = logits(r, "logits");
  a.weight = r.get<const float>("weight");
}

template <class Args>
void mixture(const Request& r, Args& a) {
  shape(r, a);
  a.teacher = logits(r, "teacher"), a.target = logits(r, "target");
  a.K = r.integer("K"), a.T = r.integer("T");
  a.first = sequences(r, "first"), a.tokens = sequences(r, "tokens"), a.inside = r.get<uint8_t>("inside");
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
    a.first = r.integer("first", 0), a.split = r.get<uint32_t>("split");
    a.stream = static_cast<uint32_t>(r.number("stream")), a.temperature = static_cast<float>(r.number("temperature"));
    cuda::sample(a, device, nullptr);
  } else if (op == "sample_product") {
    ProductArgs a{};
    a.left = r.get<double>("left"), a.right = r.get<double>("right"), a.base = r.get<double>("base");
    a.i = r.get<int64_t>("i"), a.j = r.get<int64_t>("j"), a.keys = r.get<int64_t>("keys");
    a.tokens = r.get<int64_t>("tokens"), a.stream = static_cast<uint32_t>(r.number("stream"));
    a.B = r.integer("B"), a.D = r.integer("D"), a.S = r.integer("S"), a.N = r.integer("N");
    a.draws = r.integer("draws");
    cuda::sample_product(a, device, nullptr);
  } else if (op == "reveal") {
    RevealArgs a{};
    a.x_t = r.get<int64_t>("x_t"), a.tokens = r.get<int64_t>("tokens"), a.log_prob = r.get<float>("log_prob");
    a.count = r.get<int64_t>("count"), a.noise = r.get<float>("noise"), a.keys = r.get<int64_t>("keys");
    a.x_s = r.get<int64_t>("x_s"), a.mask_id = r.integer("mask_id");
    a.stream = static_cast<uint32_t>(r.number("stream")), a.B = r.integer("B");
    a.D = r.integer("D"), a.draws = r.integer("draws");
    cuda::reveal(a, device, nullptr);
  } else if (op == "mixture") {
    MixtureArgs a{};
    mixture(r, a);
    a.joint = r.get<float>("joint"), a.correlation = r.get<float>("correlation"), a.parts = r.get<float>("parts");
    a.lse = r.get<float>("lse"), a.lse_teacher = r.get<float>("lse_teacher");
    a.lse_target = r.get<float>("lse_target"), a.share = r.get<float>("share"), a.pull = r.get<float>("pull");
    a.work = r.get<double>("work"), a.row = r.get<float>("row"), a.information = r.integer("information");
    cuda::mixture_positions(a, device, nullptr);
    a.logits.data = a.teacher.data = a.target.data = nullptr;  // whoever finishes has sums of positions alone
    a.first.data = a.tokens.data = nullptr, a.inside = nullptr, a.T = 0;
    a.lse = a.lse_teacher = a.lse_target = a.pull = nullptr;
    cuda::mixture_finish(a, device, nullptr);
  } else if (op == "mixture_backward") {
    MixtureBackwardArgs a{};
    mixture(r, a);
    a.joint = r.get<float>("joint"), a.correlation = r.get<float>("correlation");
    a.lse = r.get<float>("lse"), a.lse_teacher = r.get<float>("lse_teacher");
    a.lse_target = r.get<float>("lse_target"), a.share = r.get<float>("share"), a.pull = r.get<float>("pull");
    a.grad_joint = r.get<float>("grad_joint"), a.grad_correlation = r.get<float>("grad_correlation");
    a.grad_parts = r.get<float>("grad_parts"), a.grad = r.get<void>("grad");
    if (r.integer("in_place", 0)) {  // the gradient takes the place of the logits, which lie dense
      const int64_t bytes = a.B * a.L * a.D * cuda::row_bytes(a.logits.dtype, a.S);
      memcpy(a.grad, a.logits.data, static_cast<size_t>(bytes));
      a.logits.data = a.grad;
    }
    cuda::mixture_backward(a, device, nullptr);
  } else if (op == "row_loss") {
    RowLossArgs a{};
    shape(r, a);
    a.kind = static_cast<RowLoss>(r.integer("kind")), a.target = logits(r, "target");
    a.tokens = r.get<int64_t>("tokens"), a.loss = r.get<float>("loss"), a.stats = r.get<float>("stats");
    a.row = r.get<float>("row"), a.split = r.get<uint32_t>("split");
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
  simt::capability = static_cast<int>(r.integer("capability"));
  if (r.integer("plan", 0)) {
    simt::plan = fopen(reply_path, "w");
    run(r, simt::wanted_device);
    fclose(simt::plan);
    return;
  }
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
