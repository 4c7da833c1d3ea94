// Shares and their uncertainty; the same definitions as crsm/evaluation/statistics.py. Pure.

const Z95 = 1.959963984540054;

// 95 % Wilson score interval of a share.
export function wilson(successes, trials) {
  if (!(trials >= 1 && successes >= 0 && successes <= trials)) {
    throw new RangeError(`successes = ${successes} of trials = ${trials}; allowed: 0 ≤ successes ≤ trials, trials ≥ 1`);
  }
  const share = successes / trials;
  const scale = 1 + (Z95 * Z95) / trials;
  const centre = (share + (Z95 * Z95) / (2 * trials)) / scale;
  const half = (Z95 / scale) * Math.sqrt((share * (1 - share)) / trials + (Z95 * Z95) / (4 * trials * trials));
  // At the ends the interval touches 0 or 1 exactly; rounding must not lift it off.
  return [successes === 0 ? 0 : centre - half, successes === trials ? 1 : centre + half];
}

// Exact two-sided McNemar p-value of two systems on the same problems, from the numbers that only one of them solved.
export function mcnemar(onlyOne, onlyTwo) {
  const flips = onlyOne + onlyTwo;
  let term = 1n;
  let tail = 1n;
  for (let i = 0; i < Math.min(onlyOne, onlyTwo); i++) {
    term = (term * BigInt(flips - i)) / BigInt(i + 1);
    tail += term;
  }
  return Math.min(1, ratio(2n * tail, flips));
}

// numerator / 2^exponent as a double, without overflow on the way.
function ratio(numerator, exponent) {
  const surplus = Math.max(0, numerator.toString(2).length - 64);
  return Number(numerator >> BigInt(surplus)) * 2 ** (surplus - exponent);
}

export function formatP(p) {
  if (p >= 0.001) return p.toFixed(3);
  if (p === 0) return "< 1e-300";
  const [digits, exponent] = p.toExponential(0).split("e");
  return `${digits}e${exponent}`;
}
