/* Row loops of alternating least squares that are too small for BLAS.

   solve_packed_*: many small dense systems from packed upper triangles.
   solve_ratings:  one half step over sparse rows: for every row i with observations (j, v_ij) minimise
                   sum_j (t_ij - b - x z_j)^2 + ridge_i |x|^2 + bias_ridge_i b^2,  t_ij = v_ij - mean - c_j,
                   over x and b, where z_j and c_j are factor and bias of the other side.

   Rows are independent, so results do not depend on the number of threads. Factor rows are padded with zeros to a
   multiple of LANES floats. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define CHUNK 64
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

/* Damping rises tenfold until a factorisation exists; beyond this many times the numbers were not finite. */
#define ATTEMPTS 12

/* ---- packed systems, fp64 arithmetic ------------------------------------------------------------------------- */

static int factor_f64(double *a, int64_t r) {
    for (int64_t j = 0; j < r; j++) {
        double *row = a + j * r;
        if (!(row[j] > 0)) return 0;
        const double inverse = 1.0 / sqrt(row[j]);
        for (int64_t c = j; c < r; c++) row[c] *= inverse;
        for (int64_t i = j + 1; i < r; i++) {
            const double f = row[i];
            double *below = a + i * r;
            for (int64_t c = i; c < r; c++) below[c] -= f * row[c];
        }
    }
    return 1;
}

static void back_f64(const double *u, int64_t r, double *x) {
    for (int64_t p = 0; p < r; p++) {
        x[p] /= u[p * r + p];
        for (int64_t c = p + 1; c < r; c++) x[c] -= x[p] * u[p * r + c];
    }
    for (int64_t p = r - 1; p >= 0; p--) {
        double sum = x[p];
        for (int64_t c = p + 1; c < r; c++) sum -= u[p * r + c] * x[c];
        x[p] = sum / u[p * r + p];
    }
}

/* x = start + (G + (shift + damping) I)^-1 (b - (G + shift I) start); 0 where G = 0. Shift and damping together are
   no less than what rounding may have taken from G. */
#define SOLVE_PACKED(NAME, REAL, EPSILON)                                                                             \
    int NAME(int64_t rows, int64_t r, const REAL *grams, const REAL *rhs, const double *shifts, const REAL *start,    \
             REAL *found, int threads) {                                                                              \
        int failed = 0;                                                                                               \
        _Pragma("omp parallel num_threads(threads)") {                                                                \
            double *full = malloc((2 * r * r + r) * sizeof(double));                                                  \
            if (!full) {                                                                                              \
                _Pragma("omp atomic write") failed = 1;                                                               \
            }                                                                                                         \
            _Pragma("omp for schedule(dynamic, 16)") for (int64_t i = 0; i < rows; i++) {                             \
                if (!full) continue;                                                                                  \
                double *factor = full + r * r, *x = factor + r * r, trace = 0;                                        \
                const REAL *packed = grams + i * (r * (r + 1) / 2);                                                   \
                for (int64_t p = 0; p < r; p++)                                                                       \
                    for (int64_t c = p; c < r; c++) full[p * r + c] = full[c * r + p] = *packed++;                    \
                for (int64_t p = 0; p < r; p++) trace += full[p * r + p];                                             \
                if (!(trace > 0)) {                                                                                   \
                    for (int64_t p = 0; p < r; p++) found[i * r + p] = 0;                                             \
                    continue;                                                                                         \
                }                                                                                                     \
                const double rounding = 4 * (double)EPSILON * trace;                                                  \
                double damping = rounding > shifts[i] ? rounding - shifts[i] : 0;                                     \
                int attempt = 0;                                                                                      \
                do {                                                                                                  \
                    memcpy(factor, full, r * r * sizeof(double));                                                     \
                    for (int64_t p = 0; p < r; p++) factor[p * r + p] += shifts[i] + damping;                         \
                    damping = 10 * (damping > rounding ? damping : rounding);                                         \
                } while (!factor_f64(factor, r) && ++attempt < ATTEMPTS);                                             \
                if (attempt == ATTEMPTS) {                                                                            \
                    for (int64_t p = 0; p < r; p++) found[i * r + p] = start[i * r + p];                              \
                    continue;                                                                                         \
                }                                                                                                     \
                for (int64_t p = 0; p < r; p++) {                                                                     \
                    double sum = rhs[i * r + p] - shifts[i] * start[i * r + p];                                       \
                    for (int64_t c = 0; c < r; c++) sum -= full[p * r + c] * start[i * r + c];                        \
                    x[p] = sum;                                                                                       \
                }                                                                                                     \
                back_f64(factor, r, x);                                                                               \
                for (int64_t p = 0; p < r; p++) found[i * r + p] = (REAL)(start[i * r + p] + x[p]);                   \
            }                                                                                                         \
            free(full);                                                                                               \
        }                                                                                                             \
        return failed;                                                                                                \
    }

SOLVE_PACKED(solve_packed_f32, float, FLT_EPSILON)
SOLVE_PACKED(solve_packed_f64, double, DBL_EPSILON)

/* ---- fp32 blocks of LANES x LANES ---------------------------------------------------------------------------- */

/* g[i.., j..] += sign * sum_p a[p, i..]^T a[p, j..] for one tile of g. */
static inline void tile(const float *a, int64_t depth, int64_t ld, int64_t i, int64_t j, float *g, int64_t gld,
                        float sign) {
    vec sum[LANES] = {0};
    for (int64_t p = 0; p < depth; p++) {
        const float *row = a + p * ld;
        const vec right = *(const vec *)(row + j);
#pragma GCC unroll 8
        for (int u = 0; u < LANES; u++) sum[u] += row[i + u] * right;
    }
#pragma GCC unroll 8
    for (int u = 0; u < LANES; u++) *(vec *)(g + (i + u) * gld + j) += sign * sum[u];
}

/* The upper tiles of g (ld x ld) += a^T a, a (depth x ld). */
static void add_gram(const float *a, int64_t depth, int64_t ld, float *g) {
    for (int64_t i = 0; i < ld; i += LANES)
        for (int64_t j = i; j < ld; j += LANES) tile(a, depth, ld, i, j, g, ld, 1.0f);
}

/* a = U^T U in place of the upper triangle, ld a multiple of LANES; 0 when a is not positive definite. */
static int factor_f32(float *a, int64_t ld) {
    for (int64_t top = 0; top < ld; top += LANES) {
        for (int64_t j = top; top > 0 && j < ld; j += LANES) tile(a, top, ld, top, j, a, ld, -1.0f);
        for (int64_t i = top; i < top + LANES; i++) {
            float *row = a + i * ld;
            for (int64_t p = top; p < i; p++) {
                const float f = a[p * ld + i];
                for (int64_t c = top; c < ld; c += LANES) *(vec *)(row + c) -= f * *(vec *)(a + p * ld + c);
            }
            if (!(row[i] > 0)) return 0;
            const float inverse = 1.0f / sqrtf(row[i]);
            for (int64_t c = top; c < ld; c += LANES) *(vec *)(row + c) *= inverse;
        }
    }
    return 1;
}

static inline float total(vec v) {
    float sum = 0;
    for (int u = 0; u < LANES; u++) sum += v[u];
    return sum;
}

static inline float dot(const float *a, const float *b, int64_t ld) {
    vec sum = {0};
    for (int64_t c = 0; c < ld; c += LANES) sum += *(const vec *)(a + c) * *(const vec *)(b + c);
    return total(sum);
}

static inline void add(float *y, float f, const float *x, int64_t ld) {
    for (int64_t c = 0; c < ld; c += LANES) *(vec *)(y + c) += f * *(const vec *)(x + c);
}

static void back_f32(const float *u, int64_t ld, float *x) {
    for (int64_t p = 0; p < ld; p++) {
        const float *row = u + p * ld;
        const float f = x[p] / row[p];
        for (int64_t c = p + 1; c < ld; c++) x[c] -= f * row[c];
        x[p] = f;
    }
    for (int64_t p = ld - 1; p >= 0; p--) {
        const float *row = u + p * ld;
        float sum = 0;
        for (int64_t c = p + 1; c < ld; c++) sum += row[c] * x[c];
        x[p] = (x[p] - sum) / row[p];
    }
}

/* ---- sparse rows --------------------------------------------------------------------------------------------- */

typedef struct {
    const float *z;    /* (columns, ld) factors of the other side */
    int64_t rank, ld;
    int bias;          /* whether rows have a bias */
    float *target;     /* (max degree) t, later residuals */
    float *rows;       /* gathered z: (max(CHUNK, ld), ld) */
    float *gram;       /* (ld, ld) */
    float *factor;     /* (ld, ld) */
    float *vectors;    /* 4 of ld */
} Work;

/* Residuals of x and b in place of the targets; returns their sum of squares. */
static double residuals(const Work *w, const int32_t *index, int64_t degree, const float *x, float b) {
    double loss = 0;
    for (int64_t p = 0; p < degree; p++) {
        const float e = w->target[p] - b - dot(w->z + index[p] * w->ld, x, w->ld);
        loss += (double)e * e;
    }
    return loss;
}

/* Degree below the rank: x = Z^T a, b = (ridge / bias_ridge) sum a with (Z Z^T + ridge / bias_ridge + ridge I) a = t. */
static int solve_dual(const Work *w, const int32_t *index, int64_t degree, float ridge, float bias_ridge, float *x,
                      float *b) {
    const int64_t ld = w->ld, dld = (degree + LANES - 1) / LANES * LANES;
    const float constant = w->bias ? ridge / bias_ridge : 0.0f;
    float *kernel = w->gram, *a = w->vectors;
    for (int64_t p = 0; p < degree; p++) memcpy(w->rows + p * ld, w->z + index[p] * ld, ld * sizeof(float));
    memset(kernel, 0, dld * dld * sizeof(float));
    for (int64_t p = 0; p < degree; p++)
        for (int64_t q = p; q < degree; q++)
            kernel[p * dld + q] = constant + dot(w->rows + p * ld, w->rows + q * ld, ld);
    for (int64_t p = 0; p < degree; p++) kernel[p * dld + p] += ridge;
    for (int64_t p = degree; p < dld; p++) kernel[p * dld + p] = 1.0f;
    if (!factor_f32(kernel, dld)) return 0;
    memset(a, 0, dld * sizeof(float));
    memcpy(a, w->target, degree * sizeof(float));
    back_f32(kernel, dld, a);
    memset(x, 0, ld * sizeof(float));
    double sum = 0;
    for (int64_t p = 0; p < degree; p++) {
        add(x, a[p], w->rows + p * ld, ld);
        sum += a[p];
    }
    *b = w->bias ? (float)(constant * sum) : 0.0f;
    return 1;
}

/* One proximal Newton step from x, the bias eliminated: exact where the normal matrix has full rank. */
static void solve_primal(const Work *w, const int32_t *index, int64_t degree, float ridge, float share, float *x,
                         float *b) {
    const int64_t ld = w->ld;
    float *right = w->vectors, *sum = right + ld;
    double slope = 0, trace = 0;
    memset(w->gram, 0, ld * ld * sizeof(float));
    memset(right, 0, 2 * ld * sizeof(float));
    for (int64_t low = 0; low < degree; low += CHUNK) {
        const int64_t count = degree - low < CHUNK ? degree - low : CHUNK;
        for (int64_t p = 0; p < count; p++) {
            float *row = w->rows + p * ld;
            memcpy(row, w->z + index[low + p] * ld, ld * sizeof(float));
            const float e = w->target[low + p] - dot(row, x, ld);
            add(right, e, row, ld);
            add(sum, 1.0f, row, ld);
            slope += e;
        }
        add_gram(w->rows, count, ld, w->gram);
    }
    for (int64_t p = 0; p < ld; p++) trace += w->gram[p * ld + p];
    add(right, (float)(-share * slope), sum, ld);
    add(right, -ridge, x, ld);
    for (int64_t p = 0; p < ld && share > 0; p++)
        add(w->gram + p * ld + p / LANES * LANES, -share * sum[p], sum + p / LANES * LANES, ld - p / LANES * LANES);
    const float rounding = fmaxf((float)(4 * (double)FLT_EPSILON * trace), FLT_MIN);
    float damping = fmaxf(rounding - ridge, 0);
    for (int attempt = 0;;) {
        memcpy(w->factor, w->gram, ld * ld * sizeof(float));
        for (int64_t p = 0; p < ld; p++) w->factor[p * ld + p] += p < w->rank ? ridge + damping : 1.0f;
        damping = 10 * fmaxf(damping, rounding);
        if (factor_f32(w->factor, ld)) break;
        if (++attempt == ATTEMPTS) return;
    }
    back_f32(w->factor, ld, right);
    add(x, 1.0f, right, ld);
    *b = (float)(share * (slope - dot(sum, right, ld)));
}

/* `steps` of conjugate gradients from x, the bias eliminated; leaves residuals in target, returns their squares. */
static double solve_cg(const Work *w, const int32_t *index, int64_t degree, float ridge, float share, int steps,
                       float *x, float *b) {
    const int64_t ld = w->ld;
    float *left = w->vectors, *way = left + ld, *image = way + ld, *sum = image + ld, *e = w->target, *y = e + degree;
    double slope = 0, loss = 0;
    memset(w->vectors, 0, 4 * ld * sizeof(float));
    for (int64_t p = 0; p < degree; p++) {
        const float *row = w->z + index[p] * ld;
        e[p] -= dot(row, x, ld);
        add(left, e[p], row, ld);
        add(sum, 1.0f, row, ld);
        slope += e[p];
    }
    add(left, (float)(-share * slope), sum, ld);
    add(left, -ridge, x, ld);
    memcpy(way, left, ld * sizeof(float));
    double norm = dot(left, left, ld);
    for (int step = 0; step < steps && norm > 1e-20; step++) {
        double images = 0;
        memset(image, 0, ld * sizeof(float));
        for (int64_t p = 0; p < degree; p++) {
            const float *row = w->z + index[p] * ld;
            y[p] = dot(row, way, ld);
            add(image, y[p], row, ld);
            images += y[p];
        }
        add(image, (float)(-share * images), sum, ld);
        add(image, ridge, way, ld);
        const double curvature = dot(way, image, ld);
        if (!(curvature > 0)) break;
        const float length = (float)(norm / curvature);
        add(x, length, way, ld);
        add(left, -length, image, ld);
        for (int64_t p = 0; p < degree; p++) e[p] -= length * y[p];
        slope -= length * images;
        const double next = dot(left, left, ld);
        const float ratio = (float)(next / norm);
        for (int64_t c = 0; c < ld; c++) way[c] = left[c] + ratio * way[c];
        norm = next;
    }
    *b = (float)(share * slope);
    for (int64_t p = 0; p < degree; p++) loss += ((double)e[p] - *b) * ((double)e[p] - *b);
    return loss;
}

static double solve_row(const Work *w, const int32_t *index, int64_t degree, float ridge, float bias_ridge, int cg,
                        int steps, float *x, float *b) {
    const int dual = ridge > 0 && (!w->bias || bias_ridge > 0) && 2 * degree <= w->rank;
    if (dual && (!cg || degree <= 4 * (steps + 1)) && solve_dual(w, index, degree, ridge, bias_ridge, x, b))
        return residuals(w, index, degree, x, *b);
    const float share = w->bias ? 1.0f / ((float)degree + bias_ridge) : 0.0f;
    if (cg) return solve_cg(w, index, degree, ridge, share, steps, x, b);
    solve_primal(w, index, degree, ridge, share, x, b);
    return residuals(w, index, degree, x, *b);
}

int solve_ratings(int64_t rows, int64_t rank, int64_t ld, const int64_t *start, const int32_t *index,
                  const float *value, const int64_t *order, float mean, const float *z, const float *c, double ridge,
                  double bias_ridge, int per_entry, int bias, int steps, float *x, float *b, double *loss,
                  int threads) {
    int failed = 0;
    int64_t widest = 1;
    for (int64_t i = 0; i < rows; i++)
        if (start[i + 1] - start[i] > widest) widest = start[i + 1] - start[i];
#pragma omp parallel num_threads(threads)
    {
        const int64_t gathered = ld > CHUNK ? ld : CHUNK;
        float *memory = aligned_alloc(64, ((2 * widest + gathered * ld + 2 * ld * ld + 4 * ld) * 4 + 127) / 64 * 64);
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        Work w = {z, rank, ld, bias, 0, 0, 0, 0, 0};
        w.rows = memory;
        w.gram = w.rows + gathered * ld;
        w.factor = w.gram + ld * ld;
        w.vectors = w.factor + ld * ld;
        w.target = w.vectors + 4 * ld;
#pragma omp for schedule(dynamic, 8)
        for (int64_t n = 0; n < rows; n++) {
            const int64_t i = order[n], low = start[i], degree = start[i + 1] - low;
            if (!memory) continue;
            if (degree == 0) {
                memset(x + i * ld, 0, ld * sizeof(float));
                b[i] = 0;
                loss[i] = 0;
                continue;
            }
            for (int64_t p = 0; p < degree; p++) w.target[p] = value[low + p] - mean - c[index[low + p]];
            const double scale = per_entry ? (double)degree : 1.0;
            loss[i] = solve_row(&w, index + low, degree, (float)(scale * ridge), (float)(scale * bias_ridge),
                                steps > 0, steps, x + i * ld, b + i);
        }
        free(memory);
    }
    return failed;
}
