#pragma once

#include <cstdint>

// How many threads the graphs of a context run with, where other processes work on the same processors.
//
// The threads of a graph meet at a barrier after each operation, and wait there by spinning. If another process
// takes one of their processors, all of them wait for the thread that has lost it. One thread less is then faster:
// it leaves a processor to the other process.
//
// Threads that spin use all of their time. So the processor time of a graph, over its wall time, tells how many
// processors the graph had. Where it had fewer than threads, the next graphs run with fewer threads. From time to
// time they try all of them again.
class llama_mod_threads {
public:
    bool enabled = false;

    // threads for the next graph, of n_max that the context has; start the clocks
    int begin(int n_max);

    // the graph has run: stop the clocks and judge
    void end();

    // threads of the last graph
    int last() const { return n; }

private:
    void judge();

    int n       = 0;
    int n_spare = 0; // threads that are left out

    int64_t wall_start = 0; // microseconds, as all times here
    int64_t cpu_start  = 0;

    int64_t wall  = 0; // of the graphs since the last judgement
    int64_t cpu   = 0;
    int64_t pages = 0; // that were read from disk until then

    int64_t since = 0; // computing time since n_spare last changed
    int64_t pause = 0; // computing time until all threads are tried again; 0: no thread was left out yet
};
