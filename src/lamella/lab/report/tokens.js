"use strict";
// Text only ever enters the page through textContent.
(() => {
  const get = (id) => document.getElementById(id);
  const data = JSON.parse(get("token-data").textContent);
  const view = get("token-view"), choice = get("token-layer"), tip = get("token-tip");
  const boxes = [...view.querySelectorAll(".tokens")];
  const RUN = 400; // tokens
  const percent = (mille) => (mille / 10).toFixed(1) + " %";
  let shown = null;

  const make = (name, kind, text = "") => {
    const element = document.createElement(name);
    element.className = kind;
    element.textContent = text;
    return element;
  };
  // Eight hues; the next eight experts have them again over another line, and every expert has its number.
  const dress = (element, kind, expert, mille) => {
    element.className = expert === undefined ? kind : `${kind} hue${expert % 8} turn${(expert >> 3) % 5}`;
    if (expert === undefined) delete element.dataset.expert; else element.dataset.expert = expert;
    element.style.setProperty("--weight", (mille ?? 0) / 1000);
    return element;
  };
  const weightsOf = (token) => data.texts[token.box].weights[choice.selectedIndex]?.[token.at] ?? [];

  const texts = data.texts.map(({ tokens }, box) => tokens.map((text, at) => {
    const token = make("span", "token", text);
    token.setAttribute("role", "option");
    token.tabIndex = -1;
    return Object.assign(token, { box, at });
  }));

  const entry = (expert, mille) => {
    const item = make("li", "");
    item.append(make("span", "unseen", "expert "), dress(make("span", "", String(expert)), "chip", expert, 1000));
    item.append(make("span", "amount", percent(mille)));
    item.style.setProperty("--weight", mille / 1000);
    return item;
  };

  const paint = () => {
    const layer = data.layers[choice.selectedIndex];
    for (const token of texts.flat()) {
      const [expert, mille] = weightsOf(token);
      dress(token, "token", expert, mille);
    }
    get("token-legend").replaceChildren(...layer.shares.map((share, expert) => entry(expert, share)));
    get("token-words").textContent = `${layer.name}: ${layer.words}`;
    get("token-before").disabled = choice.selectedIndex === 0;
    get("token-after").disabled = choice.selectedIndex === data.layers.length - 1;
    if (shown) show(shown);
  };

  const place = () => {
    if (!shown) return;
    const at = shown.getBoundingClientRect(), room = view.getBoundingClientRect();
    const left = Math.min(at.left - room.left, room.width - tip.offsetWidth);
    const below = at.bottom + 6 + tip.offsetHeight <= innerHeight || at.top < tip.offsetHeight + 6;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${(below ? at.bottom + 6 : at.top - 6 - tip.offsetHeight) - room.top}px`;
  };
  const show = (token) => {
    const weights = weightsOf(token), layer = data.layers[choice.selectedIndex];
    const list = make("ul", weights.length > 10 ? "weights many" : "weights");
    for (let at = 0; at < weights.length; at += 2) list.append(entry(weights[at], weights[at + 1]));
    const others = layer.experts - weights.length / 2;
    const words = !weights.length ? "not routed here" : others ? `${others} other${others > 1 ? "s" : ""}: 0.0 %` : "";
    const name = make("bdi", "", token.textContent);
    tip.replaceChildren(name, make("span", "place", layer.name), list, make("span", "place", words));
    tip.hidden = false;
    shown = token;
    place();
  };
  const rest = () => {
    shown = null;
    tip.hidden = true;
  };

  // A long text comes in runs, so that the browser lays out only those in sight.
  const fill = (box, number) => {
    const tokens = texts[number];
    for (let at = 0; at < tokens.length; at += RUN) {
      const run = make("span", tokens.length > RUN ? "run" : "");
      run.append(...tokens.slice(at, at + RUN));
      box.append(run);
    }
  };
  // The nearest token of the line above (-1) or below (1).
  const line = (tokens, now, way) => {
    const box = (token) => token.getBoundingClientRect();
    const apart = (one, other) => one.top >= other.bottom || one.bottom <= other.top;
    const off = (token) => Math.abs(box(token).left - box(now).left);
    let best = null;
    for (let at = now.at + way; tokens[at]; at += way) {
      if (!apart(box(tokens[at]), box(now))) continue;
      if (best && apart(box(tokens[at]), box(best))) break;
      if (!best || off(tokens[at]) < off(best)) best = tokens[at];
    }
    return best;
  };
  const listen = (box, number) => {
    const tokens = texts[number], tokenOf = (event) => event.target.closest(".token");
    let stop = tokens[0]; // one stop of the Tab key per text: the arrows move inside it
    if (stop) stop.tabIndex = 0;
    box.addEventListener("pointerover", (event) => tokenOf(event) && show(tokenOf(event)));
    box.addEventListener("pointerleave", () => {
      const held = view.querySelector(".token:focus");
      if (held) show(held); else rest();
    });
    box.addEventListener("click", (event) => tokenOf(event)?.focus());
    box.addEventListener("scroll", place, { passive: true });
    box.addEventListener("focusin", (event) => {
      stop.tabIndex = -1;
      stop.removeAttribute("aria-selected");
      stop = event.target;
      stop.tabIndex = 0;
      stop.setAttribute("aria-selected", "true");
      stop.setAttribute("aria-describedby", "token-tip");
      show(stop);
    });
    box.addEventListener("focusout", () => {
      stop.removeAttribute("aria-describedby");
      rest();
    });
    box.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const step = getComputedStyle(box).direction === "rtl" ? -1 : 1;
      const next = {
        ArrowRight: () => tokens[stop.at + step],
        ArrowLeft: () => tokens[stop.at - step],
        ArrowDown: () => line(tokens, stop, 1),
        ArrowUp: () => line(tokens, stop, -1),
        Home: () => tokens[0],
        End: () => tokens.at(-1),
      }[event.key];
      if (!next) return;
      event.preventDefault();
      next()?.focus();
    });
  };
  document.addEventListener("keydown", (event) => event.key === "Escape" && rest());
  addEventListener("resize", place);
  const turn = (by) => {
    choice.selectedIndex += by;
    paint();
  };
  choice.addEventListener("change", paint);
  get("token-before").addEventListener("click", () => turn(-1));
  get("token-after").addEventListener("click", () => turn(1));
  get("token-numbers").addEventListener("change", (event) => view.classList.toggle("numbered", event.target.checked));
  view.classList.toggle("numbered", get("token-numbers").checked);
  paint();
  boxes.forEach(fill);
  boxes.forEach(listen);
})();
