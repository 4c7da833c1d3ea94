// The body of a completion request. Pure. System 1 is the same request with the channel off: no plan is asked for.

// `settings`: lag, injection_rate, simulations, hypotheses, channel, pace (0: none), temperature, max_tokens, seed.
export function completionBody(name, { model, prompt, settings, watch }) {
  const { temperature, max_tokens, seed, pace, ...steering } = settings;
  const plans = name === "two" ? steering : { ...steering, channel: "off", injection_rate: 0 };
  const shown = watch ? { events: true, trees: name === "two", log: true } : {};
  return { model, prompt, temperature, max_tokens, seed, crsm: { ...plans, ...(pace ? { pace } : {}), ...shown } };
}
