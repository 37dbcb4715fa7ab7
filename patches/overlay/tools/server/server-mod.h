#pragma once

// Mixture-of-Depths in the server: the shift of each request, what its slot decided and remembers, the trace.
//
// Upstream's files hold hooks only. A dense model has no units; then every function here does nothing.

#include "common.h"
#include "json.h"
#include "llama-mod.h"

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <list>
#include <string>
#include <vector>

using json = common_json;

// the shift of requests that name none: LLAMA_MOD_SHIFT, else 0
float server_mod_default_shift();

// the shift that a request names; throws where it is no finite number
float server_mod_read_shift(const json & body);

// for the tokens decoded from now on, and for the states read from now on
void server_mod_set_shift(llama_context * ctx, float shift);

// whether a slot's K/V were made with other adapters than those that a request has which names none
bool server_mod_other_lora(const std::vector<common_adapter_lora_info> & current, const std::vector<common_adapter_lora_info> & next);

// before states of a slot are read: they fit a context with the shift and the adapters that they were made with
void server_mod_prepare(llama_context * ctx, float shift, std::vector<common_adapter_lora_info> & lora);

// whether a draft model can go back where the model itself does; says in the log why not
bool server_mod_can_draft(common_context_seq_rm_type tgt, common_context_seq_rm_type dft);

// is a failure the library's own, of a model whose routers make drafts of the kind that is asked for impossible? the server
// ends then, instead of going on without drafts
bool server_mod_is_refusal(const std::exception & error);

// how many of n drafted tokens the model and its draft model, which may be null, can take back
int32_t server_mod_limit_draft(const llama_context * ctx, const llama_context * ctx_dft, int32_t n);

// the position that a slot cannot end at or before, as llama_memory_seq_pos_min tells it; that of the draft model too
llama_pos server_mod_pos_min(llama_context * ctx, llama_context * ctx_dft, int32_t id_slot);

// puts the dropping caches of a slot back; false where a state does not fit, and the prompt must be read again
bool server_mod_restore(llama_context * ctx, llama_context * ctx_dft, int32_t id_slot, float shift,
    std::vector<common_adapter_lora_info> & lora, const common_prompt_checkpoint & checkpoint);

// checkpoints from position p0 on, whose tokens are about to move
void server_mod_forget(std::list<common_prompt_checkpoint> & checkpoints, llama_pos p0);

// the slot that /mod/trace asks for; throws where it is no number
int32_t server_mod_read_slot(const std::string & text);

// what /slots answers, and /mod/trace: the trace of one slot, or the error where there is none
json server_mod_answer_slots(const std::string & path, const json & slots);

// the error for a request whose header Host names another machine, empty where it does not
//
// A page of any origin can let its name resolve to this machine, and would be of the server's own origin then. Only the
// Host tells. Where the server is bound to a loopback address, it is localhost or a loopback address. Names in
// LLAMA_MOD_ALLOWED_HOSTS, with commas between them, are right too; * is any.
std::string server_mod_refuse_host(const std::string & bound, const std::string & host);

// whether a path names a file of the page, which needs no key: the page asks for the key
bool server_mod_is_page(const std::string & folder, const std::string & path);

// counts of decisions, by kind
struct server_mod_counts {
    std::array<uint64_t, 4> seen   = {};
    std::array<uint64_t, 4> active = {};

    json to_json() const; // shares, of the kinds that were met
};

// what a slot decided for the tokens of its last request, and its K/V
struct server_mod_slot {
    struct entry {
        llama_token id;
        llama_pos   pos;
        bool        is_prompt;
    };

    float shift = server_mod_default_shift();

    std::vector<entry>   tokens;
    std::vector<bool>    active; // [tokens][units]
    server_mod_counts    counts;

    uint64_t kv_used  = 0; // bytes
    uint64_t kv_dense = 0;

    int32_t n_waited = 0;    // batches that were made since the slot was in one, this one included
    bool    has_turn = true; // whether the slot may be in the batch that is made now

    void begin(float shift);
    void moved(llama_pos p0, llama_pos delta); // after a context shift
};

struct server_mod_token {
    server_mod_slot * slot;
    int32_t           id_slot;
    llama_token       id;
    llama_pos         pos;
    bool              is_prompt;
};

// the figures for /metrics
struct server_mod_metrics {
    bool              is_mod = false;
    server_mod_counts counts;           // since the start
    uint64_t          kv_used      = 0; // bytes
    uint64_t          kv_committed = 0;
    uint64_t          kv_dense     = 0;
    int64_t           t_kv         = 0; // when the K/V figures were read, in milliseconds

    std::string to_prometheus() const;
};

class server_mod {
public:
    void init(llama_context * ctx);

    bool is_mod() const { return !units.empty(); }

    // whether the memory drops K/V, so that going back far needs checkpoints
    bool drops_kv() const { return kv_drops; }

    // before a batch is filled: it begins with the slot that has waited longest, or as upstream's does with the first busy slot, whichever
    // kind of batch has taken less time. Slots of another shift, another LoRA or another kind of task than the first would wait as long as it is busy.
    // ready(i) is slot i where it has something to decode, else null; together(i, j) tells whether two of these can share a batch.
    void take_turns(int32_t n_slots, const std::function<server_mod_slot * (int32_t)> & ready, const std::function<bool(int32_t, int32_t)> & together);

    // after a successful decode of n_tokens, which get(i) tells
    void decoded(int32_t n_tokens, const std::function<server_mod_token(int32_t)> & get, server_mod_metrics & metrics) const;

    // the K/V figures, where those that are there are older; not while a decode runs
    void measure(server_mod_slot & slot, int32_t id_slot) const;
    void measure(server_mod_metrics & metrics, int32_t n_slots, int64_t age_ms) const;

    json props() const;                                                // of /props; null for a dense model
    json figures(const server_mod_slot & slot, int32_t id_slot) const; // of /slots and timings; null for a dense model
    json trace  (const server_mod_slot & slot, int32_t id_slot) const; // of /mod/trace; null where nothing was decoded

private:
    json unit_json(const llama_mod_unit & unit) const;

    llama_context * ctx = nullptr;

    std::vector<llama_mod_unit> units;

    bool kv_drops = false;
    bool    was_turn = false; // whether the last batch began with the slot that had waited longest
    int64_t t_last   = 0;     // when it was filled, in microseconds
    int64_t t_behind = 0;     // how much longer the other batches have taken; not more than 0 while no slot waits
};
