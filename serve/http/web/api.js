// Kelvin's HTTP API: calls, typed errors, a job's events. All paths are relative to the page, which
// may lie behind /k/KEY/ or a proxy's prefix.

// Seeds go up to 2^64 - 1, beyond what a JavaScript number holds: long ones stay text. The pattern
// cannot meet a prompt: within a JSON string quotes are escaped.
const LONG_SEED = /"seed":\s*(\d{16,})/g;
const EVENTS = ["queued", "text", "step", "decode", "stored", "failed", "cancelled"];
const LAST = new Set(["stored", "failed", "cancelled"]);

export class ApiError extends Error {
  constructor(status, told) {
    super(told.message || "Kelvin gave no reason.");
    this.status = status;
    this.field = told.field ?? null;
    this.allowed = told.allowed ?? null;
  }

  /** Return the message with what would have been right. */
  get words() {
    return this.allowed ? `${this.message} Allowed: ${this.allowed}.` : this.message;
  }
}

export function parse(text) {
  return JSON.parse(text.replace(LONG_SEED, '"seed":"$1"'));
}

/** Return a request as JSON; its seed may be a number or digits. */
function written({ seed, ...rest }) {
  const text = JSON.stringify(rest);
  return seed == null ? text : `${text.slice(0, -1)},"seed":${BigInt(seed)}}`;
}

export async function call(method, path, body, headers = {}) {
  // Told that a page asks, Kelvin does not have the browser ask for a password of its own.
  const options = { method, headers: { "x-requested-with": "kelvin", ...headers } };
  if (body instanceof Blob) {
    options.body = body;
  } else if (body !== undefined) {
    options.body = written(body);
    options.headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ApiError(0, { message: "Kelvin does not answer; it may be restarting." });
  }
  const text = await response.text();
  let answer = null;
  try {
    answer = parse(text);
  } catch {
    // Ray Serve's proxy refuses in plain text what never reaches Kelvin.
  }
  if (response.ok && answer !== null) return answer;
  // Logged out elsewhere, or the key was revoked. Logging in is told so; all else begins anew.
  if (response.status === 401 && path !== "v1/session") window.location.reload();
  throw new ApiError(
    response.status,
    answer?.error ?? { message: `Kelvin answered ${response.status}.` },
  );
}

/** Keep a picture for requests to start from. */
export const upload = (file) => call("POST", "v1/uploads", file);

export const imagePath = (jobId, index) => `v1/jobs/${jobId}/images/${index}`;

/**
 * Follow a job to its end; the browser asks again where the connection breaks, and is told from the
 * first event on. `lost` is told where there is nothing to follow any more.
 * @returns a function that stops it
 */
export function follow(jobId, onEvent) {
  const source = new EventSource(`v1/jobs/${jobId}/events`);
  for (const name of EVENTS) {
    source.addEventListener(name, (message) => {
      if (LAST.has(name)) source.close();
      onEvent(parse(message.data));
    });
  }
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) onEvent({ event: "lost", id: jobId });
  });
  return () => source.close();
}
