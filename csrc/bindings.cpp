// di4c_ext._C: the kernels of api.h with integers and floats in and nothing out. Every argument is passed by keyword
// and named as the struct's field; a pointer is an int (0 for null); a Logits field x comes as x, x_dtype, x_stride_b,
// x_stride_l, x_stride_d, a Sequences field as x, x_stride_b, x_stride_k, x_stride_d. All checking of shapes and dtypes
// is done by di4c_ext/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "di4c/api.h"

namespace py = pybind11;

namespace {

using namespace di4c;

// A call's keyword arguments, each taken once by name; done() refuses any that no field took.
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  template <typename T>
  void operator()(const char* name, T*& pointer) {
    pointer = reinterpret_cast<T*>(take(name).cast<uintptr_t>());
  }
  void operator()(const char* name, int64_t& value) { value = take(name).cast<int64_t>(); }
  void operator()(const char* name, uint32_t& value) { value = take(name).cast<uint32_t>(); }
  void operator()(const char* name, int& value) { value = take(name).cast<int>(); }
  void operator()(const char* name, float& value) { value = take(name).cast<float>(); }
  void operator()(const char* name, RowLoss& value) {
    const int kind = take(name).cast<int>();
    if (kind < kForwardKl || kind > kCrossEntropy)
      throw py::value_error("no row loss has kind " + std::to_string(kind));
    value = static_cast<RowLoss>(kind);
  }
  void operator()(const std::string& name, Logits& x) {
    (*this)(name.c_str(), x.data);
    const int dtype = take((name + "_dtype").c_str()).cast<int>();
    if (dtype < kFloat32 || dtype > kLogistic) throw py::value_error("no dtype has number " + std::to_string(dtype));
    x.dtype = static_cast<DType>(dtype);
    (*this)((name + "_stride_b").c_str(), x.stride_b);
    (*this)((name + "_stride_l").c_str(), x.stride_l);
    (*this)((name + "_stride_d").c_str(), x.stride_d);
  }
  void operator()(const std::string& name, Sequences& x) {
    (*this)(name.c_str(), x.data);
    (*this)((name + "_stride_b").c_str(), x.stride_b);
    (*this)((name + "_stride_k").c_str(), x.stride_k);
    (*this)((name + "_stride_d").c_str(), x.stride_d);
  }

  void done() const {
    if (taken_ != given_.size()) throw py::type_error("unknown keyword among: " + py::str(given_).cast<std::string>());
  }

 private:
  py::handle take(const char* name) {
    PyObject* value = PyDict_GetItemString(given_.ptr(), name);
    if (!value) throw py::type_error(std::string("missing keyword: ") + name);
    ++taken_;
    return value;
  }

  const py::kwargs& given_;
  size_t taken_ = 0;
};

#define FIELD(name) f(#name, a.name)

void fill(Fields& f, RandomBitsArgs& a) { FIELD(keys), FIELD(out), FIELD(B), FIELD(N), FIELD(stream); }

void fill(Fields& f, SampleArgs& a) {
  FIELD(logits), FIELD(keys), FIELD(x_t), FIELD(unmask_prob), FIELD(mask_id), FIELD(tokens), FIELD(log_prob);
  FIELD(B), FIELD(D), FIELD(S), FIELD(draws), FIELD(first), FIELD(stream), FIELD(temperature);
}

void fill(Fields& f, ProductArgs& a) {
  FIELD(left), FIELD(right), FIELD(base), FIELD(i), FIELD(j), FIELD(keys), FIELD(tokens);
  FIELD(B), FIELD(D), FIELD(S), FIELD(N), FIELD(draws), FIELD(stream);
}

void fill(Fields& f, RevealArgs& a) {
  FIELD(x_t), FIELD(tokens), FIELD(log_prob), FIELD(count), FIELD(noise), FIELD(keys), FIELD(x_s);
  FIELD(mask_id), FIELD(B), FIELD(D), FIELD(draws), FIELD(stream);
}

void fill(Fields& f, MixtureArgs& a) {
  FIELD(logits), FIELD(teacher), FIELD(target), FIELD(first), FIELD(tokens), FIELD(inside), FIELD(weight);
  FIELD(joint), FIELD(correlation), FIELD(parts), FIELD(lse), FIELD(lse_teacher), FIELD(lse_target), FIELD(share);
  FIELD(pull), FIELD(work), FIELD(row);
  FIELD(B), FIELD(L), FIELD(D), FIELD(S), FIELD(K), FIELD(T), FIELD(information);
}

void fill(Fields& f, MixtureBackwardArgs& a) {
  FIELD(logits), FIELD(teacher), FIELD(target), FIELD(first), FIELD(tokens), FIELD(inside), FIELD(weight);
  FIELD(joint), FIELD(correlation), FIELD(lse), FIELD(lse_teacher), FIELD(lse_target), FIELD(share), FIELD(pull);
  FIELD(grad_joint), FIELD(grad_correlation), FIELD(grad_parts), FIELD(grad);
  FIELD(B), FIELD(L), FIELD(D), FIELD(S), FIELD(K), FIELD(T);
}

void fill(Fields& f, RowLossArgs& a) {
  FIELD(kind), FIELD(target), FIELD(tokens), FIELD(logits), FIELD(weight), FIELD(loss), FIELD(stats), FIELD(row);
  FIELD(B), FIELD(L), FIELD(D), FIELD(S);
}

void fill(Fields& f, RowLossBackwardArgs& a) {
  FIELD(kind), FIELD(target), FIELD(tokens), FIELD(logits), FIELD(weight), FIELD(stats), FIELD(grad_loss), FIELD(grad);
  FIELD(B), FIELD(L), FIELD(D), FIELD(S);
}

#ifdef DI4C_HAS_CUDA
// Workspace that CUDA kernels alone take.
template <typename Args>
void fill_workspace(Fields&, Args&) {}
void fill_workspace(Fields& f, SampleArgs& a) { FIELD(split); }
void fill_workspace(Fields& f, RowLossArgs& a) { FIELD(split); }
#endif

#undef FIELD

template <typename Args, void (*kernel)(const Args&, int)>
void define_cpu(py::module_& m, const char* name) {
  m.def(name, [](const py::kwargs& given) {
    Args args{};
    int threads = 1;
    Fields fields(given);
    fill(fields, args);
    fields("threads", threads);
    fields.done();
    py::gil_scoped_release release;
    kernel(args, threads);
  });
}

void define_cpu_kernels(py::module_ m) {
  define_cpu<RandomBitsArgs, cpu::random_bits>(m, "random_bits");
  define_cpu<SampleArgs, cpu::sample>(m, "sample");
  define_cpu<ProductArgs, cpu::sample_product>(m, "sample_product");
  define_cpu<RevealArgs, cpu::reveal>(m, "reveal");
  define_cpu<MixtureArgs, cpu::mixture_positions>(m, "mixture_positions");
  define_cpu<MixtureArgs, cpu::mixture_finish>(m, "mixture_finish");
  define_cpu<MixtureBackwardArgs, cpu::mixture_backward>(m, "mixture_backward");
  define_cpu<RowLossArgs, cpu::row_loss>(m, "row_loss");
  define_cpu<RowLossBackwardArgs, cpu::row_loss_backward>(m, "row_loss_backward");
}

#ifdef DI4C_HAS_CUDA
template <typename Args, void (*kernel)(const Args&, int, void*)>
void define_cuda(py::module_& m, const char* name) {
  m.def(name, [](const py::kwargs& given) {
    Args args{};
    int device = 0;
    void* stream = nullptr;
    Fields fields(given);
    fill(fields, args);
    fill_workspace(fields, args);
    fields("device", device);
    fields("stream_handle", stream);
    fields.done();
    py::gil_scoped_release release;
    kernel(args, device, stream);
  });
}

void define_cuda_kernels(py::module_ m) {
  define_cuda<RandomBitsArgs, cuda::random_bits>(m, "random_bits");
  define_cuda<SampleArgs, cuda::sample>(m, "sample");
  define_cuda<ProductArgs, cuda::sample_product>(m, "sample_product");
  define_cuda<RevealArgs, cuda::reveal>(m, "reveal");
  define_cuda<MixtureArgs, cuda::mixture_positions>(m, "mixture_positions");
  define_cuda<MixtureArgs, cuda::mixture_finish>(m, "mixture_finish");
  define_cuda<MixtureBackwardArgs, cuda::mixture_backward>(m, "mixture_backward");
  define_cuda<RowLossArgs, cuda::row_loss>(m, "row_loss");
  define_cuda<RowLossBackwardArgs, cuda::row_loss_backward>(m, "row_loss_backward");
}
#else
#define DI4C_CUDA_ARCHS ""
#define DI4C_CUDA_VERSION ""
void define_cuda_kernels(const py::module_&) {}
#endif

py::dict info() {
  py::dict d;
  d["isa_built"] = cpu::isas_built();
  d["isa_active"] = cpu::isa_active();
  d["cuda"] = DI4C_CUDA_ARCHS[0] != '\0';
  d["cuda_archs"] = DI4C_CUDA_ARCHS;
  d["cuda_reason"] = DI4C_CUDA_REASON;
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "g++ " __VERSION__;
#endif
  d["cuda_version"] = DI4C_CUDA_VERSION;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of di4c_ext; use them through di4c_ext.ops.";
  define_cpu_kernels(m.def_submodule("cpu"));
  define_cuda_kernels(m.def_submodule("cuda"));
  m.attr("POSITIONS") = kPositions;
  m.attr("LONG_ROW") = kLongRow;
  m.attr("FEW_ROWS") = kFewRows;
  m.def("info", &info, "What was built and what serves.");
}
