// The server's endpoints, beside the page on its own origin (relative, so that a path prefix in front does no harm). Whatever goes wrong comes out as an ApiError with the server's
// words; an aborted request comes out as the AbortError that fetch throws.

import { EventParser } from "./sse.js";

const KEY = "crsm.key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, param, retryAfter });
  }
}

export const isAbort = (error) => error?.name === "AbortError";

// The key lives as long as the tab.
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

export const getInfo = (signal) => json("v1/crsm/info", { signal });

export const getProblem = (task, index, signal) =>
  json(`v1/crsm/problems/${encodeURIComponent(task)}?index=${index}`, { signal });

export const checkAnswer = (task, index, text, signal) => json("v1/crsm/check", { body: { task, index, text }, signal });

export const setPlanners = (count) => json("v1/crsm/planners", { method: "PUT", body: { count } });

export const complete = (body, signal) => json("v1/completions", { body, signal });

// The chunks of a streamed completion with their arrival times: {chunk, at}.
export async function* streamCompletion(body, signal) {
  const response = await send("v1/completions", { body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (isAbort(error)) throw error;
      return { done: true };
    });
    if (done) throw new ApiError("The stream broke off before its end.");
    const at = performance.now();
    for (const data of parser.push(value)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorFrom(chunk, 0);
      yield { chunk, at };
    }
  }
}

async function json(path, options) {
  return (await send(path, options)).json();
}

async function send(path, { method, body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (apiKey.get()) headers["Authorization"] = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "same-origin",
    });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  throw errorFrom(await response.json().catch(() => null), response.status, response.headers.get("Retry-After"));
}

function errorFrom(answer, status, retryAfter = null) {
  const { message, code, param } = answer?.error ?? {};
  return new ApiError(message ?? `The server answered ${status}.`, {
    status,
    code,
    param,
    retryAfter: retryAfter === null ? null : Number(retryAfter),
  });
}
