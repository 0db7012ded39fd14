// The operations of the CPU that gain from being compiled; native.py compiles and calls them.
// Rows are contiguous. Sums run in a fixed order, so results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float number(float value) { return value; }

inline float number(bfloat16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
}

// Integers in the order of the numbers; NaN is above all of them, so that it is seen.
inline int32_t key_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
    return (bits & 0x7fffffff) > 0x7f800000 ? INT32_MAX : key;
}

// The m-th largest of keys, which are put in another order.
int32_t threshold(std::vector<int32_t>& keys, int64_t m) {
    std::nth_element(keys.begin(), keys.begin() + (m - 1), keys.end(), std::greater<int32_t>());
    return keys[m - 1];
}

// Columns per group: as many as leave clearly more groups than are wanted.
int64_t group_size(int64_t width, int64_t m) {
    int64_t size = 64;
    while (size > 1 && width / size < 4 * m) size /= 2;
    return size;
}

// Values with a bias per column, or with none.
template <typename T>
struct Row {
    const T* values;
    const float* bias;
    int64_t width;

    int32_t key(int64_t i) const { return key_of(bias ? number(values[i]) + bias[i] : number(values[i])); }

    // The largest key of columns [first, last).
    int32_t best(int64_t first, int64_t last) const {
        int32_t found = INT32_MIN;
        if (bias) {
#pragma omp simd reduction(max : found)
            for (int64_t i = first; i < last; ++i) {
                const int32_t other = key_of(number(values[i]) + bias[i]);
                found = other > found ? other : found;
            }
        } else {
#pragma omp simd reduction(max : found)
            for (int64_t i = first; i < last; ++i) {
                const int32_t other = key_of(number(values[i]));
                found = other > found ? other : found;
            }
        }
        return found;
    }
};

// Columns whose keys may be among the largest, ascending.
struct Candidates {
    std::vector<int32_t> keys;
    std::vector<int64_t> columns;

    // Those of [first, last) with a key of at least `least`.
    template <typename T>
    void add(const Row<T>& row, int64_t first, int64_t last, int32_t least) {
        size_t n = keys.size();
        keys.resize(n + last - first);
        columns.resize(n + last - first);
        for (int64_t i = first; i < last; ++i) {
            const int32_t key = row.key(i);
            keys[n] = key;
            columns[n] = i;
            n += key >= least;
        }
        keys.resize(n);
        columns.resize(n);
    }

    // The m largest, ascending by column; of equal ones the first.
    void largest(int64_t m, int64_t* out, std::vector<int32_t>& scratch) const {
        scratch = keys;
        const int32_t at = threshold(scratch, m);
        int64_t n_at = m;
        for (int64_t i = 0; i < m; ++i) n_at -= scratch[i] > at;
        for (size_t i = 0; i < keys.size(); ++i)
            if (keys[i] > at || (keys[i] == at && n_at-- > 0)) *out++ = columns[i];
    }
};

// The m largest lie in the groups whose maxima are at least the m-th largest maximum.
template <typename T>
void top_columns(const T* values, const float* bias, int64_t n, int64_t width, int64_t m, int64_t* out, int threads) {
    const int64_t size = group_size(width, m), n_groups = (width + size - 1) / size;
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> maxima(n_groups), scratch;
        Candidates found;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; ++t) {
            const Row<T> row{values + t * width, bias, width};
            for (int64_t g = 0; g < n_groups; ++g) maxima[g] = row.best(g * size, std::min((g + 1) * size, width));
            scratch = maxima;
            const int32_t least = threshold(scratch, m);
            found.keys.clear();
            found.columns.clear();
            for (int64_t g = 0; g < n_groups; ++g)
                if (maxima[g] >= least) found.add(row, g * size, std::min((g + 1) * size, width), least);
            found.largest(m, out + t * m, scratch);
        }
    }
}

// As top_columns of one long row, by several threads.
template <typename T>
void top_entries(const T* values, int64_t width, int64_t m, int64_t* out, int threads) {
    const Row<T> row{values, nullptr, width};
    const int64_t size = group_size(width, m), n_groups = (width + size - 1) / size;
    std::vector<int32_t> maxima(n_groups), scratch;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < n_groups; ++g) maxima[g] = row.best(g * size, std::min((g + 1) * size, width));
    scratch = maxima;
    const int32_t least = threshold(scratch, m);
    std::vector<Candidates> parts(threads);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int part = 0; part < threads; ++part)
        for (int64_t g = n_groups * part / threads; g < n_groups * (part + 1) / threads; ++g)
            if (maxima[g] >= least) parts[part].add(row, g * size, std::min((g + 1) * size, width), least);
    for (int part = 1; part < threads; ++part) {
        parts[0].keys.insert(parts[0].keys.end(), parts[part].keys.begin(), parts[part].keys.end());
        parts[0].columns.insert(parts[0].columns.end(), parts[part].columns.begin(), parts[part].columns.end());
    }
    parts[0].largest(m, out, scratch);
}

}  // namespace

extern "C" {

void top_columns_float32(const float* values, const float* bias, int64_t n, int64_t width, int64_t m, int64_t* out,
                         int threads) {
    top_columns(values, bias, n, width, m, out, threads);
}

void top_columns_bfloat16(const void* values, const float* bias, int64_t n, int64_t width, int64_t m, int64_t* out,
                          int threads) {
    top_columns(static_cast<const bfloat16*>(values), bias, n, width, m, out, threads);
}

void top_entries_float32(const float* values, int64_t n, int64_t m, int64_t* out, int threads) {
    top_entries(values, n, m, out, threads);
}

void top_entries_bfloat16(const void* values, int64_t n, int64_t m, int64_t* out, int threads) {
    top_entries(static_cast<const bfloat16*>(values), n, m, out, threads);
}

// out[i] is x[t] . rows[indices[i]] for the entries i of token t.
void row_products(const float* x, const float* rows, const int64_t* indices, const int64_t* offsets, int64_t n_tokens,
                  int64_t d, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < n_tokens; ++t) {
        const float* token = x + t * d;
        for (int64_t i = offsets[t]; i < offsets[t + 1]; ++i) {
            const float* row = rows + indices[i] * d;
            if (i + 1 < offsets[n_tokens]) {
                const float* following = rows + indices[i + 1] * d;
                for (int64_t c = 0; c < d; c += 16) __builtin_prefetch(following + c);
            }
            float product = 0;
#pragma omp simd reduction(+ : product)
            for (int64_t c = 0; c < d; ++c) product += token[c] * row[c];
            out[i] = product;
        }
    }
}

// Row j of out is the sum of values[i] * x[t] over the entries i with indices[i] == j, t their token.
void scatter_outer(const float* values, const int64_t* indices, const int64_t* offsets, const float* x,
                   int64_t n_tokens, int64_t n_latents, int64_t d, float* out, int threads) {
    const int64_t nnz = offsets[n_tokens];
    std::vector<int64_t> ends(n_latents + 1, 0);
    for (int64_t i = 0; i < nnz; ++i) ++ends[indices[i] + 1];
    for (int64_t j = 0; j < n_latents; ++j) ends[j + 1] += ends[j];
    std::vector<int64_t> token(nnz);  // by latent, then by token
    std::vector<float> weight(nnz);
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t i = offsets[t]; i < offsets[t + 1]; ++i) {
            const int64_t place = next[indices[i]]++;
            token[place] = t;
            weight[place] = values[i];
        }
    }
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads)
    for (int64_t j = 0; j < n_latents; ++j) {
        float* row = out + j * d;
        std::memset(row, 0, d * sizeof(float));
        for (int64_t i = ends[j]; i < ends[j + 1]; ++i) {
            const float* source = x + token[i] * d;
            const float factor = weight[i];
#pragma omp simd
            for (int64_t c = 0; c < d; ++c) row[c] += factor * source[c];
        }
    }
}

// Subtract from each row of grad its part along the unit row; squares[j] is the squared norm of what is left.
void project_rows(float* grad, const float* rows, int64_t n, int64_t d, float* squares, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t j = 0; j < n; ++j) {
        float* g = grad + j * d;
        const float* row = rows + j * d;
        float along = 0, square = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t c = 0; c < d; ++c) along += g[c] * row[c];
#pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < d; ++c) {
            g[c] -= along * row[c];
            square += g[c] * g[c];
        }
        squares[j] = square;
    }
}

void normalise_rows(float* rows, int64_t n, int64_t d, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t j = 0; j < n; ++j) {
        float* row = rows + j * d;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < d; ++c) square += row[c] * row[c];
        const float norm = std::sqrt(square);
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) row[c] /= norm;
    }
}

}  // extern "C"
