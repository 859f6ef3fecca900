// Runs a viewer page without a browser: `node gflow_page.js PAGE.html`. The document and WebGL are stand-ins that record what the page's program hands to them; prints JSON.
const fs = require("fs"), text = fs.readFileSync(process.argv[2], "utf8"), seen = { draws: [], textures: [], orders: [], views: [], said: [] };
const inner = id => text.match(new RegExp(`<script type="[a-z/]+" id="${id}">([^]*?)</script>`))[1];
const elements = {}, handlers = {};
function element(id) {
  return elements[id] ??= { id, tagName: id === "scene" ? "CANVAS" : "BUTTON", attributes: {}, style: {}, clientWidth: 480, clientHeight: 272, listeners: {},
    textContent: id === "meta" || id === "data" ? inner(id) : "", setAttribute(k, v) { this.attributes[k] = String(v) }, addEventListener(k, f) { this.listeners[k] = f }, focus() {}, setPointerCapture() {},
    getContext: kind => process.argv[3] === "nogl" ? null : gl };
}
const calls = {
  getShaderParameter: () => true, getProgramParameter: () => true, getUniformLocation: (p, n) => n, createTexture: () => ({}), createBuffer: () => ({}), createProgram: () => ({}), createShader: () => ({}),
  texImage2D: (...a) => seen.textures.push({ width: a[3], height: a[4], data: Array.from(a[8]) }), texSubImage2D: (...a) => seen.textures.push({ width: a[4], height: a[5], data: Array.from(a[8]) }),
  bufferSubData: (target, at, data) => seen.orders.push(Array.from(data)), uniformMatrix4fv: (n, t, m) => seen.views.push(Array.from(m)), drawArraysInstanced: (mode, first, corners, count) => seen.draws.push(count),
};
const gl = new Proxy({}, { get: (_, name) => calls[name] ?? (name === name.toUpperCase() ? name : () => undefined) });
const frames = [];
globalThis.document = { getElementById: element, addEventListener: (k, f) => { handlers[k] = f }, body: { classList: { add: c => seen.said.push(c) } } };
globalThis.window = { devicePixelRatio: 1 };
globalThis.requestAnimationFrame = f => frames.push(f);
let clock = 0;
const step = (ms = 50) => { clock += ms; const f = frames.shift(); if (f) f(clock) };
const program = text.match(/<script>([^]*?)<\/script>/)[1];
(0, eval)(program);
if (process.argv[3] !== "nogl") {
  const key = k => handlers.keydown({ key: k, target: element("scene"), preventDefault() {} }), slider = element("time");
  step();
  slider.value = slider.max = String(+process.argv[4] || 0); slider.oninput(); step();   // last frame, following
  for (const k of ["ArrowLeft", "ArrowUp", "+", "a", "w", "m", ","]) { key(k); step() }
  const canvas = element("scene"), at = (id, x, y) => ({ pointerId: id, clientX: x, clientY: y, buttons: 1 });
  canvas.onpointerdown(at(1, 100, 100)); canvas.onpointermove(at(1, 140, 90)); step();    // orbit
  canvas.onpointerdown(at(2, 200, 100)); canvas.onpointermove(at(2, 260, 120)); step();   // pinch
  canvas.onpointerup(at(1, 0, 0)); canvas.onpointerup(at(2, 0, 0));
  canvas.listeners.wheel({ deltaY: 100, preventDefault() {} }); step();
  key("h"); step(); seen.home = seen.views.at(-1);
  key("f"); step(); key(" "); step(500); step(500); key(" "); step();                     // follow, play
  seen.follow = element("follow").attributes["aria-pressed"]; seen.movers = element("movers").attributes["aria-pressed"]; seen.status = element("said").textContent; seen.time = slider.value;
}
seen.message = element("message").textContent;
console.log(JSON.stringify(seen));
