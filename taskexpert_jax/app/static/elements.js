// Builds elements. Text becomes text nodes, so names of files and classes can never be markup.

/** An element with properties or, where they have a hyphen or are `role`, attributes; then its content in order. */
export function element(tag, properties = {}, ...content) {
  const built = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") built.setAttribute(name, value);
    else built[name] = value;
  }
  built.append(...content);
  return built;
}

/** A number with a fixed number of decimals and a true minus sign. */
export function fixed(value, decimals) {
  return value.toFixed(decimals).replace("-", "−");
}

/** A share in percent; small ones are not rounded to 0. */
export function percent(share) {
  return share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

/** A colour [red, green, blue] for CSS. */
export function css(colour) {
  return `rgb(${colour.join(" ")})`;
}
