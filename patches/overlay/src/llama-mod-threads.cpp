#include "llama-mod-threads.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <ctime>

#if !defined(_WIN32)
#include <sys/resource.h>
#endif

static constexpr int64_t WINDOW    =  100*1000; // computing time that one judgement rests on
static constexpr int64_t PAUSE_MIN =  250*1000;
static constexpr int64_t PAUSE_MAX = 8000*1000;
static constexpr int64_t CALM      = 2000*1000; // with all threads for so long: others have finished

// processors that may be missing: interrupts and short-lived processes take some time on a quiet machine too
static constexpr double LOST_MAX = 0.3;

// a process that shares a processor with one of our threads takes half of it
static constexpr double LOST_PER_THREAD = 0.5;

// processor time of all threads of this process in microseconds, -1 where there is no such clock
static int64_t cpu_time_us() {
#if defined(CLOCK_PROCESS_CPUTIME_ID)
    timespec t;
    if (clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t) == 0) {
        return (int64_t) t.tv_sec*1000000 + t.tv_nsec/1000;
    }
#endif
    return -1;
}

// pages that this process has waited for a disk to read
static int64_t pages_read() {
#if !defined(_WIN32)
    rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) == 0) {
        return usage.ru_majflt;
    }
#endif
    return 0;
}

int llama_mod_threads::begin(int n_max) {
    if (!enabled) {
        n = n_max;
        return n;
    }
    n          = std::max(1, n_max - n_spare);
    wall_start = ggml_time_us();
    cpu_start  = cpu_time_us();
    return n;
}

void llama_mod_threads::end() {
    if (!enabled || cpu_start < 0) {
        return;
    }
    wall += ggml_time_us() - wall_start;
    cpu  += cpu_time_us()  - cpu_start;
    if (wall >= WINDOW) {
        // threads that wait for a disk have lost no processor, and more of them read more at once
        const int64_t read = pages_read();
        if (read == pages) {
            judge();
        }
        pages = read;
        wall  = 0;
        cpu   = 0;
    }
}

void llama_mod_threads::judge() {
    since += wall;

    const double lost = n - (double) cpu/wall;
    if (lost > LOST_MAX && n > 1) {
        if (n_spare == 0) {
            pause = pause == 0 || since > CALM ? PAUSE_MIN : std::min(2*pause, PAUSE_MAX);
        }
        n_spare += std::clamp((int) std::lround(lost/LOST_PER_THREAD), 1, n - 1);
        since    = 0;
    } else if (n_spare > 0 && since > pause) {
        n_spare = 0;
        since   = 0;
    }
}
