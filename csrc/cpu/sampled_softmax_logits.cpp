#include "sampled_softmax_logits.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "embedding_tables.h"
#include "float_product.h"
#include "float_split.h"
#include "isa.h"

namespace pk {

using at::Tensor;

namespace {

// A tile: 480 KiB of float32, a quarter of an L2 cache. Rows of 512 would share the sets of L1.
constexpr int64_t kRows = 256, kColumns = 480;
constexpr int64_t kChunks = 8;                           // of the classes in backward, each with a dx of its own
constexpr int64_t kPartials = int64_t{64} << 20;         // bytes of those dx, if that leaves two chunks
constexpr int64_t kUnit = 32;                            // rows and columns of tile registers
constexpr int64_t kLeastRows = 128, kLeastColumns = 64;  // below these splitting float32 takes the time it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t n) { return ceil_div(n, kUnit) * kUnit; }
int64_t split_size(int64_t rows, int64_t depth) { return ceil_div(rows, kUnit) * ceil_div(depth, kUnit) * kSplit; }

// How many chunks depends on sizes alone, so the order of sums does not depend on the number of threads.
int64_t chunks_of(int64_t tiles, int64_t batch, int64_t cols) {
  const int64_t fit = kPartials / std::max<int64_t>(1, 4 * batch * cols);
  return std::clamp<int64_t>(tiles, 1, std::clamp<int64_t>(fit, 2, kChunks));
}

const char* row_of(const Tensor& matrix, int64_t row) {
  return static_cast<const char*>(matrix.const_data_ptr()) + row * matrix.stride(0) * matrix.element_size();
}
const uint16_t* words(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
uint16_t* words_out(const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

}  // namespace

// One thread's products in float32, by torch. Rows of a bfloat16 or float16 table are widened tile by tile.
class Wide {
 public:
  explicit Wide(const Logits& logits)
      : x_(logits.x_),
        table_(logits.table_),
        dtype_(logits.dtype_),
        options_(logits.x_.options()),
        cols_(logits.cols_) {
    if (dtype_ != TableDtype::kFloat) scratch_ = at::empty({kColumns, cols_}, options_);
  }

  void load(int64_t column, int64_t columns) {
    rows_ = table_.narrow(0, column, columns);
    if (dtype_ == TableDtype::kFloat) return;
    for (int64_t r = 0; r < columns; ++r) {
      sampled_softmax_kernels().widen(dtype_, row_of(table_, column + r),
                                      scratch_.mutable_data_ptr<float>() + r * cols_, cols_);
    }
    rows_ = scratch_.narrow(0, 0, columns);
  }
  void logits(const TileArgs& t) const {
    Tensor z = view(t.z, t.rows, t.columns, t.z_stride);
    at::mm_out(z, x_.narrow(0, t.row, t.rows), rows_.t());
  }
  void add_dx(const TileArgs& t, float* dx) const { view(dx, t.rows, cols_, cols_).addmm_(dz(t), rows_); }
  void gradient(const TileArgs& t, float* out) const {
    Tensor sum = view(out, t.columns, cols_, cols_);
    const Tensor left = dz(t).t(), right = x_.narrow(0, t.row, t.rows);
    t.row ? sum.addmm_(left, right) : at::mm_out(sum, left, right);
  }

 private:
  Tensor view(void* data, int64_t rows, int64_t columns, int64_t stride) const {
    return at::from_blob(data, {rows, columns}, {stride, 1}, options_);
  }
  Tensor dz(const TileArgs& t) const { return view(t.dz, t.rows, t.columns, t.dz_stride); }

  const Tensor &x_, &table_;
  TableDtype dtype_;
  at::TensorOptions options_;
  int64_t cols_;
  Tensor scratch_, rows_;
};

// One thread's products of bfloat16 on tile registers, into float32. What is beyond a matrix is zero.
class Low {
 public:
  explicit Low(const Logits& logits)
      : logits_(logits),
        pitch_(logits.x_.size(1)),
        rows_(at::zeros({kColumns, pitch_}, logits.x_.options())),
        right_(at::empty({pitch_, kColumns}, rows_.options())),
        pairs_(at::empty({kColumns, pitch_}, rows_.options())),
        turned_(at::empty({kColumns, kRows}, rows_.options())),
        buffer_(at::empty({kColumns, kRows}, rows_.options())) {}

  void load(int64_t column, int64_t columns) {
    columns_ = padded(columns);
    for (int64_t r = 0; r < columns; ++r) {
      std::memcpy(words_out(rows_) + r * pitch_, row_of(logits_.table_, column + r), logits_.cols_ * sizeof(uint16_t));
    }
    std::fill_n(words_out(rows_) + columns * pitch_, (columns_ - columns) * pitch_, uint16_t{0});
    amx_.pair_transposed(words(rows_), pitch_, columns_, pitch_, words_out(right_));
    fresh_ = true;
  }
  void logits(const TileArgs& t) const {
    amx_.product(padded(t.rows), columns_, pitch_, words(logits_.x_) + t.row * pitch_, pitch_, words(right_), t.z,
                 t.z_stride, false);
  }
  void add_dx(const TileArgs& t, float* dx) {
    if (fresh_) amx_.pair(words(rows_), pitch_, columns_, pitch_, words_out(pairs_));
    fresh_ = false;
    amx_.product(padded(t.rows), pitch_, columns_, static_cast<const uint16_t*>(t.dz), t.dz_stride, words(pairs_), dx,
                 pitch_, true);
  }
  void gradient(const TileArgs& t, float* out) const {
    const int64_t rows = padded(t.rows);
    amx_.transpose(static_cast<const uint16_t*>(t.dz), t.dz_stride, rows, columns_, words_out(turned_),
                   words_out(buffer_));
    amx_.product(columns_, pitch_, rows, words(turned_), rows, words(logits_.pairs_) + t.row * pitch_, out, pitch_,
                 t.row != 0);
  }

 private:
  const SampledSoftmaxAmx& amx_ = *sampled_softmax_amx();
  const Logits& logits_;
  int64_t pitch_, columns_ = 0;
  bool fresh_ = false;
  Tensor rows_, right_, pairs_, turned_, buffer_;
};

// One thread's products in float32 on tile registers: half as long again as torch's, and nearer to the exact ones. What
// cannot be split is left to Wide.
class Split {
 public:
  explicit Split(const Logits& logits) : logits_(logits), wide_(logits) {}

  void load(int64_t column, int64_t columns) {
    const Tensor& table = logits_.table_;
    rows_ = reinterpret_cast<const float*>(row_of(table, column));
    stride_ = table.stride(0);
    fits_ = largest_bits(rows_, stride_, columns, logits_.cols_) < kUnsplittable;
    if (!fits_) wide_.load(column, columns);
  }
  void logits(const TileArgs& t) const {
    if (!fits_) return wide_.logits(t);
    product_of_split(t.rows, t.columns, logits_.cols_, words(logits_.pairs_) + split_size(t.row, logits_.cols_), rows_,
                     stride_, true, t.z, t.z_stride, false);
  }
  void add_dx(const TileArgs& t, float* dx) {
    if (!fits_ || !split_dz(t, false)) {
      if (fits_) wide_.load(t.column, t.columns);
      return wide_.add_dx(t, dx);
    }
    product_of_split(t.rows, logits_.cols_, t.columns, words(parts_), rows_, stride_, false, dx, logits_.cols_, true);
  }
  void gradient(const TileArgs& t, float* out) {
    if (!split_dz(t, true)) return wide_.gradient(t, out);
    const Tensor& x = logits_.x_;
    product_of_split(t.columns, logits_.cols_, t.rows, words(parts_), reinterpret_cast<const float*>(row_of(x, t.row)),
                     x.stride(0), false, out, logits_.cols_, t.row != 0);
  }

 private:
  bool split_dz(const TileArgs& t, bool turned) {
    if (!parts_.defined()) parts_ = at::empty({split_size(kColumns, kRows)}, logits_.pairs_.options());
    return split(static_cast<const float*>(t.dz), t.dz_stride, turned ? t.columns : t.rows, turned ? t.rows : t.columns,
                 turned, words_out(parts_));
  }

  const Logits& logits_;
  Wide wide_;
  Tensor parts_;
  const float* rows_ = nullptr;
  int64_t stride_ = 0;
  bool fits_ = false;
};

Logits::Logits(const Tensor& x, const Tensor& table, const char* function)
    : low_(x.scalar_type() == at::kBFloat16 && has_tile_registers()),
      x_(with_rows(x.detach())),  // torch's products run on threads that do not know that we are below autograd
      table_(with_rows(table.detach())),
      batch_(x.size(0)),
      cols_(x.size(1)),
      dtype_(loss_dtype(table, function)) {
  if (!low_) {
    x_ = x_.to(at::kFloat);
    const bool large = batch_ >= kLeastRows && classes() >= kLeastRows && cols_ >= kLeastColumns;
    if (large && dtype_ == TableDtype::kFloat && has_tile_registers()) {
      pairs_ = at::empty({split_size(batch_, cols_)}, x_.options().dtype(at::kBFloat16));
      split_ = split(x_.const_data_ptr<float>(), x_.stride(0), batch_, cols_, false, words_out(pairs_));
    }
    return;
  }
  const int64_t rows = padded(batch_), pitch = padded(cols_);
  const Tensor whole = at::zeros({rows, pitch}, x.options());
  whole.narrow(0, 0, batch_).narrow(1, 0, cols_).copy_(x);
  x_ = whole;
  pairs_ = at::empty({rows, pitch}, x.options());
  for (int64_t row = 0; row < rows; row += kRows) {
    sampled_softmax_amx()->pair(words(x_) + row * pitch, pitch, std::min(kRows, rows - row), pitch,
                                words_out(pairs_) + row * pitch);
  }
}

// Kept logits lie tile after tile, so that a tile is one stretch of memory.
void Logits::place(TileArgs& t, const Tensor& kept, const Tensor& z) const {
  t.z = kept.defined() ? kept.mutable_data_ptr<float>() + batch_ * t.column + t.row * t.columns
                       : z.mutable_data_ptr<float>();
  t.z_stride = kept.defined() ? t.columns : kColumns;
}

template <class Products>
void Logits::reduce_with(const TileArgs& loss, const Tensor& kept) const {
  const SampledSoftmaxKernels& kernels = sampled_softmax_kernels();
  // Few rows are shared out all the same. Torch's products of a lone tile have threads of their own.
  const int64_t share = padded(ceil_div(batch_, at::get_num_threads()));
  const int64_t tall = std::is_same_v<Products, Wide> ? kRows : std::clamp(share, kUnit, kRows);
  at::parallel_for(0, ceil_div(batch_, tall), 1, [&](int64_t begin, int64_t end) {
    const Tensor z = at::empty({kRows, kColumns}, x_.options().dtype(at::kFloat));
    Products products(*this);
    TileArgs t = loss;
    t.narrow = low_;
    for (t.column = 0; t.column < classes(); t.column += kColumns) {
      t.columns = std::min(kColumns, classes() - t.column);
      t.add = loss.add ? loss.add + t.column : nullptr;
      products.load(t.column, t.columns);
      for (t.row = begin * tall; t.row < std::min(end * tall, batch_); t.row += tall) {
        t.rows = std::min(tall, batch_ - t.row);
        place(t, kept, z);
        products.logits(t);
        kernels.finish_logits(t);
        kernels.reduce(t);
      }
    }
  });
}

template <class Products>
Tensor Logits::gradient_with(const TileArgs& loss, const Tensor& kept, bool want_dx, const Store& store,
                             bool want_sums) const {
  const SampledSoftmaxKernels& kernels = sampled_softmax_kernels();
  const auto options = x_.options().dtype(at::kFloat);
  const int64_t rows = x_.size(0), pitch = x_.size(1), tiles = ceil_div(classes(), kColumns);
  const int64_t chunks = chunks_of(tiles, rows, pitch);
  const Tensor partials = want_dx ? at::zeros({chunks, rows, pitch}, options) : Tensor();
  at::parallel_for(0, tiles ? chunks : 0, 1, [&](int64_t begin, int64_t end) {
    const Tensor z = at::empty({kRows, kColumns}, options);
    const Tensor dz = low_ ? at::zeros({kRows, kColumns}, x_.options()) : z;
    const Tensor gradient = store ? at::zeros({kColumns, pitch}, options) : Tensor();  // stays so without a batch
    const Tensor sums = want_sums ? at::empty({kColumns}, options) : Tensor();
    Products products(*this);
    TileArgs t = loss;
    t.narrow = low_;
    t.dz = dz.mutable_data_ptr();
    t.dz_stride = kColumns;
    t.column_sums = want_sums ? sums.mutable_data_ptr<float>() : nullptr;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* const dx = want_dx ? partials.mutable_data_ptr<float>() + chunk * rows * pitch : nullptr;
      for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; ++tile) {
        t.column = tile * kColumns;
        t.columns = std::min(kColumns, classes() - t.column);
        t.add = loss.add ? loss.add + t.column : nullptr;
        if (want_sums) std::fill_n(t.column_sums, t.columns, 0.f);
        products.load(t.column, t.columns);
        for (t.row = 0; t.row < batch_; t.row += kRows) {
          t.rows = std::min(kRows, batch_ - t.row);
          place(t, kept, z);
          if (!kept.defined()) {
            products.logits(t);
            kernels.finish_logits(t);
          }
          // Tile registers take whole units, and those of the tile before may reach beyond this one.
          if (low_ && (t.rows < kRows || t.columns < kColumns)) dz.zero_();
          kernels.gradient(t);
          if (want_dx) products.add_dx(t, dx + t.row * pitch);
          if (store) products.gradient(t, gradient.mutable_data_ptr<float>());
        }
        if (store) store(t.column, t.columns, gradient.const_data_ptr<float>(), pitch, t.column_sums);
      }
    }
  });
  if (!want_dx) return {};
  const Tensor dx = chunks == 1 ? partials[0] : partials.sum(0);
  return dx.narrow(0, 0, batch_).narrow(1, 0, cols_).contiguous();
}

void Logits::reduce(const TileArgs& loss, const Tensor& kept) const {
  TORCH_CHECK(!(low_ && kept.defined()), "logits of bfloat16 products are not kept");
  low_ ? reduce_with<Low>(loss, kept) : split_ ? reduce_with<Split>(loss, kept) : reduce_with<Wide>(loss, kept);
}

Tensor Logits::gradient(const TileArgs& loss, const Tensor& kept, bool want_dx, const Store& store,
                        bool want_sums) const {
  return low_     ? gradient_with<Low>(loss, kept, want_dx, store, want_sums)
         : split_ ? gradient_with<Split>(loss, kept, want_dx, store, want_sums)
                  : gradient_with<Wide>(loss, kept, want_dx, store, want_sums);
}

}  // namespace pk
