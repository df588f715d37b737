#include "float_product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "float_split.h"
#include "isa.h"
#include "scratch.h"

namespace pk {
namespace {

constexpr int64_t kLeast = 128;  // of rows, columns and depth: below, splitting takes the time it saves
constexpr int64_t kUnits = 32;   // rows and columns of tile registers

// A piece of the result, in which the parts of the left factor, 128 of its depth at a time, take 768 KiB of a
// second-level cache. Fewer rows, and the right factor is split more often.
constexpr int64_t kPieceRows = 1024, kDeep = 128;
constexpr int64_t kFewest = 64;  // rows and columns of a piece, where there are many threads

struct Rows {  // a matrix by rows; or `turned`: its transpose by rows
  const float* data;
  int64_t stride;
  bool turned;

  const float* at(int64_t row, int64_t column) const {
    return turned ? data + column * stride + row : data + row * stride + column;
  }
};

bool by_rows(const at::Tensor& t) { return t.stride(1) == 1 && t.stride(0) >= t.size(1); }
Rows rows_of_matrix(const at::Tensor& t) {
  const bool turned = !by_rows(t);
  return {t.const_data_ptr<float>(), t.stride(turned ? 1 : 0), turned};
}
bool readable(const at::Tensor& t) { return by_rows(t) || by_rows(t.t()); }

// A size in parts of equal multiples of tiles.
int64_t part(int64_t size, int64_t parts) { return ((size + parts - 1) / parts + kUnits - 1) / kUnits * kUnits; }
int64_t pieces(int64_t size, int64_t each) { return (size + each - 1) / each; }

}  // namespace

bool Fits::operator()() {
  if (!found_) {
    const Rows m = rows_of_matrix(all_);
    const int64_t rows = all_.size(m.turned ? 1 : 0), columns = all_.size(m.turned ? 0 : 1);
    const auto of_some = [&](int64_t begin, int64_t end, uint32_t found) {
      return std::max(found, largest_bits(m.data + begin * m.stride, m.stride, end - begin, columns));
    };
    const auto larger = [](uint32_t a, uint32_t b) { return std::max(a, b); };
    found_ = at::parallel_reduce(0, rows, kPieceRows, uint32_t{0}, of_some, larger) < kUnsplittable;
  }
  return *found_;
}

bool splits(int64_t rows, int64_t columns, int64_t depth) {
  return std::min({rows, columns, depth}) >= kLeast && has_tile_registers();
}

void product(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool add, Fits& of_a, Fits& of_b) {
  const int64_t rows = a.size(0), columns = b.size(1), depth = a.size(1);
  const bool usable =
      splits(rows, columns, depth) && depth <= kDeepest && readable(a) && readable(b) && by_rows(c) && of_a() && of_b();
  if (!usable) {
    at::Tensor out = c;
    add ? void(out.addmm_(a, b)) : void(at::mm_out(out, a, b));
    return;
  }
  const Rows left = rows_of_matrix(a), right = rows_of_matrix(b);
  float* const to = c.mutable_data_ptr<float>();
  const int64_t pitch = c.stride(0), threads = at::get_num_threads();
  // Threads share out the result. An element's sum has the same order in whatever piece it is.
  const int64_t tall = std::clamp(part(rows, threads), kFewest, kPieceRows), down = pieces(rows, tall);
  const int64_t wide = std::max(part(columns, pieces(threads, down)), kFewest), across = pieces(columns, wide);
  at::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    const int64_t bytes = tall / kUnits * (kDeep / kUnits) * kSplit * static_cast<int64_t>(sizeof(uint16_t));
    uint16_t* const parts = static_cast<uint16_t*>(scratch(bytes));
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / across * tall, column = piece % across * wide;
      const int64_t height = std::min(tall, rows - row), width = std::min(wide, columns - column);
      for (int64_t k = 0; k < depth; k += kDeep) {
        const int64_t deep = std::min(kDeep, depth - k);
        split(left.at(row, k), left.stride, height, deep, left.turned, parts);
        product_of_split(height, width, deep, parts, right.at(k, column), right.stride, right.turned,
                         to + row * pitch + column, pitch, add || k);
      }
    }
  });
}

void product(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool add) {
  Fits of_a(a), of_b(b);
  product(c, a, b, add, of_a, of_b);
}

}  // namespace pk
