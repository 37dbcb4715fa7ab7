#include "llama-mod-origin.h"

#include "llama-impl.h"
#include "llama-io.h"

#include <stdexcept>

// more are not read, whatever a broken state says
static constexpr uint32_t MOD_MAX_THRESHOLDS = 1 << 16;

static const char * const MOD_FORCE_NAMES[] = { "none", "active", "inactive" };

static const char * mod_force_name(int32_t force) {
    return force >= 0 && force < 3 ? MOD_FORCE_NAMES[force] : "unknown";
}

void llama_mod_digest::add(const void * data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        value = (value ^ ((const uint8_t *) data)[i])*0x100000001b3;
    }
}

void llama_mod_digest::add(const std::string & s) {
    add(s.c_str(), s.size() + 1);
}

std::string llama_mod_origin::difference(const llama_mod_origin & now) const {
    if (model != now.model) {
        return "the state belongs to another model";
    }
    if (mixed || now.mixed) {
        return "the state has tokens that were processed with different thresholds or adapters";
    }
    if (type_k != now.type_k || type_v != now.type_v || v_trans != now.v_trans) {
        return "the state holds K/V of another type";
    }
    if (rope != now.rope) {
        return "the state was made with other RoPE parameters";
    }
    if (adapters != now.adapters) {
        return "the state was made with other adapters";
    }
    if (force != now.force) {
        return format("the state was made with force %s, the context has %s", mod_force_name(force), mod_force_name(now.force));
    }
    if (shift != now.shift) {
        return format("the state was made with threshold shift %g, the context has %g", shift, now.shift);
    }
    if (thresholds != now.thresholds) {
        return "the state was made with other thresholds";
    }
    return "";
}

template <typename Self, typename F> static void mod_for_each_value(Self & o, F f) {
    f(o.model);
    f(o.rope);
    f(o.adapters);
    f(o.type_k);
    f(o.type_v);
    f(o.v_trans);
    f(o.force);
    f(o.shift);
}

void llama_mod_origin::write(llama_io_write_i & io) const {
    mod_for_each_value(*this, [&](const auto & x) { io.write(&x, sizeof(x)); });

    const uint32_t info[2] = { mixed, (uint32_t) thresholds.size() };
    io.write(info, sizeof(info));
    if (!thresholds.empty()) {
        io.write(thresholds.data(), thresholds.size()*sizeof(float));
    }
}

void llama_mod_origin::read(llama_io_read_i & io) {
    mod_for_each_value(*this, [&](auto & x) { io.read(&x, sizeof(x)); });

    uint32_t info[2];
    io.read(info, sizeof(info));
    if (info[1] > MOD_MAX_THRESHOLDS) {
        throw std::runtime_error("mod: the state is broken");
    }
    mixed = info[0] != 0;
    thresholds.resize(info[1]);
    if (!thresholds.empty()) {
        io.read(thresholds.data(), thresholds.size()*sizeof(float));
    }
}
