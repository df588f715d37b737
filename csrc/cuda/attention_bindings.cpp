#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <tuple>

#include "attention.h"
#include "attention_decode.h"
#include "bind.h"

namespace pk {

namespace {

using Layout = std::array<int64_t, sizeof(AttentionLayout) / sizeof(int64_t)>;
using Numbers = std::array<float, sizeof(AttentionNumbers) / sizeof(float)>;
using Pointers = std::array<uintptr_t, 12>;

Attention arguments(const Pointers& p, const Layout& layout, const Numbers& numbers) {
  static_assert(offsetof(Attention, n) == sizeof(Pointers), "as many pointers as the struct begins with");
  Attention a{};
  std::memcpy(&a, p.data(), sizeof p);
  std::memcpy(&a.n, layout.data(), sizeof layout);
  std::memcpy(&a.x, numbers.data(), sizeof numbers);
  return a;
}

template <class T>
using Given =
    std::conditional_t<std::is_same_v<T, RowStrides>, std::tuple<int64_t, int64_t, int64_t>, detail::InPython<T>>;

template <class T>
T converted(const Given<T>& x) {
  if constexpr (std::is_same_v<T, RowStrides>)
    return {std::get<0>(x), std::get<1>(x), std::get<2>(x)};
  else
    return detail::from_python<T>(x);
}

// In Python: the twelve tensors of Attention, its layout, its numbers, then the launcher's own arguments.
template <class... P>
void def_attention(pybind11::module_& m, const char* name, void (*launcher)(const Attention&, P...)) {
  using U = uintptr_t;
  m.def(name, [launcher](U q, U k, U v, U bias, U mask, U seen, U span, U prefix, U slopes, U cu_q, U cu_k, U seed,
                         const Layout& layout, const Numbers& numbers, const Given<P>&... own) {
    const Pointers pointers{q, k, v, bias, mask, seen, span, prefix, slopes, cu_q, cu_k, seed};
    launcher(arguments(pointers, layout, numbers), converted<P>(own)...);
  });
}

// In Python: the thirteen tensors of Decode, its layout, its numbers, and a dtype.
void def_decode(pybind11::module_& m, const char* name, void (*launcher)(const Decode&, DType, void*)) {
  using U = uintptr_t;
  using Sizes = std::array<int64_t, sizeof(DecodeLayout) / sizeof(int64_t)>;
  using Tensors = std::array<U, 13>;
  static_assert(offsetof(Decode, n) == sizeof(Tensors), "as many pointers as the struct begins with");
  m.def(name, [launcher](U q, U k, U v, U lengths, U table, U sinks, U slopes, U out, U lse, U part, U top, U total,
                         U record, const Sizes& layout, std::array<float, 2> numbers, int dtype, U stream) {
    const Tensors pointers{q, k, v, lengths, table, sinks, slopes, out, lse, part, top, total, record};
    Decode a{};
    std::memcpy(&a, pointers.data(), sizeof pointers);
    std::memcpy(&a.n, layout.data(), sizeof layout);
    a.x = {numbers[0], numbers[1]};
    launcher(a, static_cast<DType>(dtype), reinterpret_cast<void*>(stream));
  });
}

}  // namespace

void bind_attention(pybind11::module_& m) {
  def_attention(m, "attention_forward", &attention_forward);
  def_attention(m, "attention_forward_sm90", &attention_forward_sm90);
  def_attention(m, "attention_rows", &attention_rows);
  def_attention(m, "attention_dq", &attention_dq);
  def_attention(m, "attention_dkdv", &attention_dkdv);
  def_attention(m, "attention_dq_sm90", &attention_dq_sm90);
  def_attention(m, "attention_dkdv_sm90", &attention_dkdv_sm90);
  def_attention(m, "attention_dbias", &attention_dbias);
  def_attention(m, "attention_dbias_rows", &attention_dbias_rows);
  def_decode(m, "attention_decode", &attention_decode);
  def_decode(m, "attention_decode_merge", &attention_decode_merge);
}

}  // namespace pk
