// Elements from data. Text only ever becomes text: nothing here, or anywhere on the page, parses
// markup, so a prompt that looks like HTML is shown as it was written.

export const byId = (id) => document.getElementById(id);

/** Return a new element; properties are set as attributes, children appended as text or nodes. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, String(value));
  }
  made.append(...children.filter(Boolean));
  return made;
}

/** Show a message in an element, or hide it where there is none. */
export function tell(shown, message) {
  shown.textContent = message || "";
  shown.hidden = !message;
}
