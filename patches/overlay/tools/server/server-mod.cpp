#include "server-mod.h"

#include "log.h"
#include "server-common.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <sstream>
#include <stdexcept>

static const char * const KINDS[] = { "block", "attn", "ffn", "kv" }; // in the order of llama_mod_kind

//
// the shift
//

float server_mod_default_shift() {
    static const float shift = [] {
        const char * text = getenv("LLAMA_MOD_SHIFT");
        const float value = text ? strtof(text, nullptr) : 0.0f;
        return std::isfinite(value) ? value : 0.0f;
    }();
    return shift;
}

float server_mod_read_shift(const json & body) {
    if (!body.contains("threshold_shift") || body.at("threshold_shift").is_null()) {
        return server_mod_default_shift();
    }
    const auto & value = body.at("threshold_shift");
    if (!value.is_number() || !std::isfinite(value.get<float>())) {
        throw std::invalid_argument("threshold_shift is a finite number");
    }
    return value.get<float>();
}

void server_mod_set_shift(llama_context * ctx, float shift) {
    llama_mod_set_shift(ctx, shift); // a dense model has none
}

bool server_mod_other_lora(const std::vector<common_adapter_lora_info> & current, const std::vector<common_adapter_lora_info> & next) {
    return !current.empty() && !are_lora_equal(current, next) && lora_should_clear_cache(current, next);
}

void server_mod_prepare(llama_context * ctx, float shift, std::vector<common_adapter_lora_info> & lora) {
    server_mod_set_shift(ctx, shift);
    common_set_adapter_lora(ctx, lora);
}

//
// going back
//

// whether a context's memory drops K/V; a dense model's keeps all, or hides what it drops
static bool drops_kv(const llama_context * ctx) {
    llama_mod_perf perf;
    if (!ctx || !llama_mod_get_perf(ctx, &perf)) {
        return false; // of draft heads, too, where the model has routers
    }
    const auto * model = llama_get_model(ctx);
    return llama_mod_kv_window(model) > 0 || llama_model_n_swa(model) > 0;
}

// upstream goes back to a checkpoint of both models where the model needs one, and ends the process where its draft model alone does
bool server_mod_can_draft(common_context_seq_rm_type tgt, common_context_seq_rm_type dft) {
    const bool res = dft != COMMON_CONTEXT_SEQ_RM_TYPE_FULL || tgt == COMMON_CONTEXT_SEQ_RM_TYPE_FULL;
    if (!res) {
        SRV_ERR("%s", "the draft model has recurrent states, from which a drafted token cannot be taken back beside this model; "
                "use a draft model without them (-md)\n");
    }
    return res;
}

bool server_mod_is_refusal(const std::exception & error) {
    return string_starts_with(error.what(), "mod: ");
}

int32_t server_mod_limit_draft(const llama_context * ctx, const llama_context * ctx_dft, int32_t n) {
    for (const auto * one : { ctx, ctx_dft }) {
        if (drops_kv(one)) {
            n = std::min(n, llama_mod_get_kv_rollback(one));
        }
    }
    return n;
}

llama_pos server_mod_pos_min(llama_context * ctx, llama_context * ctx_dft, int32_t id_slot) {
    const auto pos_min = llama_memory_seq_pos_min(llama_get_memory(ctx), id_slot);
    return drops_kv(ctx_dft) ? std::max(pos_min, llama_memory_seq_pos_min(llama_get_memory(ctx_dft), id_slot)) : pos_min;
}

static bool restore(llama_context * ctx, int32_t id_slot, const std::vector<uint8_t> & data) {
    return !ctx || data.empty() ||
        llama_state_seq_set_data_ext(ctx, data.data(), data.size(), id_slot, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == data.size();
}

bool server_mod_restore(llama_context * ctx, llama_context * ctx_dft, int32_t id_slot, float shift,
        std::vector<common_adapter_lora_info> & lora, const common_prompt_checkpoint & checkpoint) {
    server_mod_prepare(ctx, shift, lora);
    return restore(ctx, id_slot, checkpoint.data_tgt) && restore(ctx_dft, id_slot, checkpoint.data_dft);
}

void server_mod_forget(std::list<common_prompt_checkpoint> & checkpoints, llama_pos p0) {
    checkpoints.remove_if([p0](const common_prompt_checkpoint & checkpoint) { return checkpoint.pos_max >= p0; });
}

//
// the page
//

int32_t server_mod_read_slot(const std::string & text) {
    try {
        return std::stoi(text);
    } catch (const std::exception &) {
        throw std::invalid_argument("id_slot is a number");
    }
}

json server_mod_answer_slots(const std::string & path, const json & slots) {
    if (!string_ends_with(path, "/mod/trace")) {
        return slots;
    }
    for (size_t i = 0; i < slots.size(); ++i) {
        if (!slots[i].is_null()) {
            return slots[i];
        }
    }
    return format_error_response("the slot has decoded nothing, or the model has no routers", ERROR_TYPE_NOT_FOUND);
}

bool server_mod_is_page(const std::string & folder, const std::string & path) {
    if (folder.empty() || path.empty() || path[0] != '/' || path.find("..") != std::string::npos) {
        return false;
    }
    std::error_code error;
    return path == "/" || std::filesystem::is_regular_file(folder + path, error);
}

//
// the header Host
//

// the name in a Host header: without spaces, port, brackets and the dot of the root, in small letters
static std::string host_name(std::string host) {
    host.erase(std::remove_if(host.begin(), host.end(), [](unsigned char c) { return std::isspace(c); }), host.end());
    if (!host.empty() && host[0] == '[') {
        host = host.substr(1, host.find(']') - 1);
    } else if (std::count(host.begin(), host.end(), ':') == 1) {
        host = host.substr(0, host.find(':'));
    }
    if (!host.empty() && host.back() == '.') {
        host.pop_back();
    }
    std::transform(host.begin(), host.end(), host.begin(), [](unsigned char c) { return std::tolower(c); });
    return host;
}

static bool is_loopback(const std::string & name) {
    const bool is_ipv4 = name.find_first_not_of("0123456789.") == std::string::npos; // 127.example.org is a name
    return name == "localhost" || string_ends_with(name, ".localhost") || name == "::1" || (is_ipv4 && name.rfind("127.", 0) == 0);
}

std::string server_mod_refuse_host(const std::string & bound, const std::string & host) {
    static const std::vector<std::string> allowed = [] {
        const char * text = getenv("LLAMA_MOD_ALLOWED_HOSTS");
        auto names = string_split<std::string>(text ? text : "", ',');
        std::transform(names.begin(), names.end(), names.begin(), host_name);
        return names;
    }();
    const auto name = host_name(host);
    if (!is_loopback(host_name(bound)) || name.empty() || is_loopback(name)) {
        return "";
    }
    if (std::any_of(allowed.begin(), allowed.end(), [&](const auto & one) { return one == "*" || one == name; })) {
        return "";
    }
    LOG_WRN("%s: refused a request for another host: %s\n", __func__, host.c_str());
    const json error = format_error_response("this server does not answer for the host " + host, ERROR_TYPE_PERMISSION);
    return safe_json_to_str({{ "error", error }});
}

//
// figures
//

json server_mod_counts::to_json() const {
    json result = json::object();
    for (size_t kind = 0; kind < seen.size(); ++kind) {
        if (seen[kind] > 0) {
            result[KINDS[kind]] = (double) active[kind] / (double) seen[kind];
        }
    }
    return result;
}

void server_mod_slot::begin(float shift) {
    *this = {};
    this->shift = shift;
}

void server_mod_slot::moved(llama_pos p0, llama_pos delta) {
    for (auto & token : tokens) {
        if (token.pos >= p0) {
            token.pos += delta;
        }
    }
}

std::string server_mod_metrics::to_prometheus() const {
    if (!is_mod) {
        return "";
    }
    std::stringstream out;
    const auto head = [&out](const std::string & name, const char * text) {
        out << "# HELP llamacpp:" << name << " " << text << "\n# TYPE llamacpp:" << name << " gauge\n";
    };
    head("mod_activation_ratio", "Share of the pairs of token and unit that were active since the start, by kind");
    for (size_t kind = 0; kind < counts.seen.size(); ++kind) {
        if (counts.seen[kind] > 0) {
            out << "llamacpp:mod_activation_ratio{kind=\"" << KINDS[kind] << "\"} "
                << (double) counts.active[kind] / (double) counts.seen[kind] << "\n";
        }
    }
    const auto gauge = [&](const char * name, const char * text, auto value) {
        head(name, text);
        out << "llamacpp:" << name << " " << value << "\n";
    };
    gauge("mod_kv_used_bytes",      "K and V of the cells in use",                      kv_used);
    gauge("mod_kv_committed_bytes", "Memory behind K and V",                            kv_committed);
    gauge("mod_kv_dense_bytes",     "K and V that a dense model would hold",            kv_dense);
    gauge("mod_threshold_shift",    "Shift of the thresholds for requests without one", server_mod_default_shift());
    return out.str();
}

//
// the model
//

void server_mod::init(llama_context * ctx) {
    this->ctx = ctx;
    const auto * model = llama_get_model(ctx);

    units.resize(llama_mod_n_units(model));
    for (size_t i = 0; i < units.size(); ++i) {
        llama_mod_get_unit(model, i, &units[i]);
    }
    // checkpoints of hybrids are as rare as llama-server makes them, since they hold the recurrent states
    kv_drops = ::drops_kv(ctx) && !llama_model_is_hybrid(model);

    if (getenv("LLAMA_MOD_ADAPTIVE_THREADS")) {
        llama_mod_set_adaptive_threads(ctx, true);
    }
}

void server_mod::take_turns(int32_t n_slots, const std::function<server_mod_slot * (int32_t)> & ready, const std::function<bool(int32_t, int32_t)> & together) {
    int32_t longest  = -1;
    int32_t n_waited = 1;
    for (int32_t i = 0; i < n_slots; ++i) {
        if (auto * slot = ready(i)) {
            slot->has_turn = true;
            if (++slot->n_waited > n_waited) {
                n_waited = slot->n_waited;
                longest  = i;
            }
        }
    }
    const int64_t now = ggml_time_us();
    t_behind += was_turn ? t_last - now : now - t_last;
    t_behind  = longest < 0 ? std::min(t_behind, (int64_t) 0) : t_behind;
    t_last    = now;
    // never twice, so that an empty batch, where a request is refused, is followed by another
    was_turn = longest >= 0 && t_behind >= 0 && !was_turn;
    for (int32_t i = 0; was_turn && i < n_slots; ++i) {
        if (auto * slot = ready(i)) {
            slot->has_turn = together(longest, i);
        }
    }
}

void server_mod::decoded(int32_t n_tokens, const std::function<server_mod_token(int32_t)> & get, server_mod_metrics & metrics) const {
    for (int32_t i = 0; i < n_tokens; ++i) {
        get(i).slot->n_waited = 0;
    }
    const uint8_t * active = nullptr;
    if (!is_mod() || llama_mod_get_trace(ctx, &active, nullptr) != n_tokens) {
        return;
    }
    std::map<int32_t, server_mod_slot *> slots;
    for (int32_t i = 0; i < n_tokens; ++i, active += units.size()) {
        const auto token = get(i);
        auto & slot = *token.slot;
        slots[token.id_slot] = token.slot;

        // a draft that was refused is decoded again
        while (!slot.tokens.empty() && slot.tokens.back().pos >= token.pos) {
            slot.tokens.pop_back();
        }
        slot.active.resize(slot.tokens.size()*units.size());
        slot.tokens.push_back({ token.id, token.pos, token.is_prompt });
        slot.active.insert(slot.active.end(), active, active + units.size());

        for (size_t u = 0; u < units.size(); ++u) {
            for (auto * counts : { &slot.counts, &metrics.counts }) {
                counts->seen  [units[u].kind] += 1;
                counts->active[units[u].kind] += active[u];
            }
        }
    }
    for (const auto & [id_slot, slot] : slots) {
        measure(*slot, id_slot);
    }
}

void server_mod::measure(server_mod_slot & slot, int32_t id_slot) const {
    llama_mod_kv_seq_stats stats;
    if (is_mod() && llama_mod_get_kv_seq_stats(ctx, id_slot, &stats)) {
        slot.kv_used  = stats.bytes_used;
        slot.kv_dense = stats.bytes_dense;
    }
}

void server_mod::measure(server_mod_metrics & metrics, int32_t n_slots, int64_t age_ms) const {
    metrics.is_mod = is_mod();
    if (!is_mod() || ggml_time_ms() - metrics.t_kv < age_ms) {
        return;
    }
    metrics.t_kv = ggml_time_ms();
    llama_mod_kv_stats stats;
    if (llama_mod_get_kv_stats(ctx, -1, &stats)) {
        metrics.kv_used      = stats.bytes_used;
        metrics.kv_committed = stats.bytes_committed;
    }
    metrics.kv_dense = 0;
    for (int32_t id_slot = 0; id_slot < n_slots; ++id_slot) {
        server_mod_slot slot;
        measure(slot, id_slot);
        metrics.kv_dense += slot.kv_dense;
    }
}

//
// answers
//

json server_mod::unit_json(const llama_mod_unit & unit) const {
    json result = {
        { "layer", unit.layer },
        { "kind",  KINDS[unit.kind] },
        { "head",  nullptr },
    };
    if (unit.head >= 0) {
        result["head"] = unit.head;
    }
    return result;
}

json server_mod::props() const {
    if (!is_mod()) {
        return nullptr;
    }
    json list  = json::array();
    json kinds = json::array();
    for (const auto & unit : units) {
        json item = unit_json(unit);
        item["threshold"]  = unit.threshold;
        item["activation"] = unit.activation;
        item["window"]     = unit.window;
        list.push_back(item);
    }
    for (size_t kind = 0; kind < std::size(KINDS); ++kind) {
        if (std::any_of(units.begin(), units.end(), [kind](const auto & unit) { return unit.kind == (int) kind; })) {
            kinds.push_back(KINDS[kind]);
        }
    }
    const auto * model = llama_get_model(ctx);
    return json {
        { "units",     list },
        { "kinds",     kinds },
        { "n_sink",    llama_mod_n_sink(model) },
        { "kv_window", llama_mod_kv_window(model) },
        { "shift",     server_mod_default_shift() },
    };
}

json server_mod::figures(const server_mod_slot & slot, int32_t id_slot) const {
    if (!is_mod()) {
        return nullptr;
    }
    return json {
        { "id_slot",        id_slot },
        { "shift",          slot.shift },
        { "activation",     slot.counts.to_json() },
        { "kv_used_bytes",  slot.kv_used },
        { "kv_dense_bytes", slot.kv_dense },
    };
}

json server_mod::trace(const server_mod_slot & slot, int32_t id_slot) const {
    if (!is_mod() || slot.tokens.empty()) {
        return nullptr;
    }
    json list   = json::array();
    json tokens = json::array();
    json active = json::array();
    for (const auto & unit : units) {
        list.push_back(unit_json(unit));
    }
    for (size_t i = 0; i < slot.tokens.size(); ++i) {
        std::string row(units.size(), '0');
        for (size_t u = 0; u < units.size(); ++u) {
            row[u] += slot.active[i*units.size() + u];
        }
        active.push_back(row);
        tokens.push_back(json {
            { "id",   slot.tokens[i].id },
            { "text", common_token_to_piece(ctx, slot.tokens[i].id, true) },
        });
    }
    const auto n_prompt = std::count_if(slot.tokens.begin(), slot.tokens.end(), [](const auto & token) { return token.is_prompt; });
    return json {
        { "id_slot",  id_slot },
        { "units",    list },
        { "tokens",   tokens },
        { "n_prompt", n_prompt },
        { "active",   active },
    };
}
