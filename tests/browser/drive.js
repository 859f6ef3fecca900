// Opens pages in a headless chromium and prints what happened as JSON: `node drive.js TASK PAGE FOLDER [OPTIONS as JSON]`. Screenshots go to FOLDER; the test judges.
// CAMFLOW_CHROMIUM: the browser's program; CAMFLOW_PLAYWRIGHT: a folder with node_modules/playwright-core, when it isn't beside this file.
const path = require("path"), { pathToFileURL } = require("url"), { createHash } = require("crypto");
const { chromium } = require(require.resolve("playwright-core", { paths: [process.env.CAMFLOW_PLAYWRIGHT, __dirname].filter(Boolean) }));
const [task, file, folder, more] = process.argv.slice(2), options = JSON.parse(more || "{}");
const FLAGS = ["--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"];
const sum = bytes => createHash("sha1").update(bytes).digest("hex").slice(0, 12);
const wait = ms => new Promise(done => setTimeout(done, ms));

// a page that remembers everything that a reader would not see: errors, warnings of the console, and requests that leave the disk
async function open(browser, url, size = { width: 900, height: 600 }, extra = {}) {
  const context = await browser.newContext({ viewport: size, deviceScaleFactor: 1, ...extra }), page = await context.newPage(), said = [], requests = [];
  page.on("console", m => { if (["error", "warning"].includes(m.type())) said.push(m.type() + ": " + m.text()) });
  page.on("pageerror", e => said.push("uncaught: " + e.message));
  page.on("request", r => { if (!/^(file|data|blob):/.test(r.url())) requests.push(r.url()) });
  page.on("requestfailed", r => said.push("failed request: " + r.url().slice(0, 200)));
  await page.goto(url, { waitUntil: "load", timeout: 60000 });
  return { page, said, requests, close: () => context.close() };
}
// how far the page is wider than the window, and what sticks out (boxes that scroll by themselves may be wide inside)
const overflow = page => page.evaluate(() => {
  const width = document.documentElement.clientWidth, scrolls = e => { for (; e && e !== document.body; e = e.parentElement) if (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX)) return true; return false };
  const out = [...document.body.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement)).map(e => `${e.tagName}.${e.className} ${Math.round(e.getBoundingClientRect().right)}: ${(e.textContent || "").trim().slice(0, 40)}`);
  return { width, page: document.documentElement.scrollWidth, out: out.slice(0, 6) };
});

const TASKS = {
  // the viewer of a GFlow timeline
  async viewer(browser, url) {
    const seen = { steps: {} }, { page, said, requests, close } = await open(browser, url, options.size), scene = page.locator("#scene");
    // the ring of the keyboard's focus is no change of the picture, and a canvas on whole pixels is not resampled
    await page.addStyleTag({ content: "#scene{outline:none!important}.bar{height:44px;box-sizing:border-box;flex-shrink:0}.tools{height:88px}" });
    const settle = () => page.evaluate(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(done)))));
    const shot = async name => { await settle(); const bytes = await scene.screenshot(name ? { path: path.join(folder, name + ".png") } : {}); return sum(bytes) };
    const step = async (name, act) => { const before = await shot(); await act(); for (let i = 0; i < 50 && !(seen.steps[name] = await shot(options.keep ? name : "") !== before); i++) await wait(100) };
    const key = k => () => page.keyboard.press(k), state = () => page.evaluate(() => ({ time: +document.getElementById("time").value, follow: document.getElementById("follow").getAttribute("aria-pressed"),
      movers: document.getElementById("movers").getAttribute("aria-pressed"), playing: document.getElementById("play").getAttribute("aria-pressed"), said: document.getElementById("said").textContent }));
    seen.renderer = await page.evaluate(() => { const gl = document.createElement("canvas").getContext("webgl2"), more = gl && gl.getExtension("WEBGL_debug_renderer_info"); return gl ? gl.getParameter(more ? more.UNMASKED_RENDERER_WEBGL : gl.RENDERER) : null });
    seen.plain = await page.evaluate(() => document.body.classList.contains("plain")); seen.message = await page.textContent("#message");
    if (seen.plain) { seen.said = said; return seen }
    seen.canvas = await page.evaluate(() => { const c = document.getElementById("scene"); return { width: c.width, height: c.height, client: [c.clientWidth, c.clientHeight] } });
    await shot("first"); seen.first = await state();
    await page.locator("#time").focus(); await page.keyboard.press("End"); seen.last = await state(); await shot("last"); await page.keyboard.press("Home");
    await page.keyboard.press("m"); seen.slider = await state(); await page.keyboard.press("m");   // keys work with the focus on the slider, too
    await page.click("#home"); await page.locator("#scene").focus();
    const home = await shot("home");
    for (const k of ["ArrowLeft", "ArrowUp", "+", "-", "a", "w", "m"]) await step(k, key(k));
    await key("m")(); await key("h")(); seen.home_again = await shot() === home;
    const box = await scene.boundingBox(), x = box.x + box.width / 2, y = box.y + box.height / 2;
    const drag = button => async () => { await page.mouse.move(x, y); await page.mouse.down({ button }); await page.mouse.move(x + 30, y + 12, { steps: 2 }); await page.mouse.up({ button }) };
    await step("drag", drag("left")); await step("right drag", drag("right")); await step("wheel", () => page.mouse.wheel(0, 240));
    const after = await shot(); await page.mouse.move(x + 60, y - 30); seen.still_when_released = await shot() === after;
    await key("f")(); seen.following = await state(); await shot("follow");
    await key(".")(); seen.next = (await state()).time; await key(",")(); seen.back = (await state()).time;
    await key(" ")(); seen.playing = (await state()).playing; const times = [];
    for (let i = 0; i < 400 && new Set(times).size < 3; i++) { await wait(100); times.push((await state()).time) }
    await key(" ")(); seen.times = times; seen.stopped = await state();
    await page.click("#follow"); await step("follow button", () => page.click("#follow"));
    const fits = () => page.evaluate(() => { const c = document.getElementById("scene"); return [c.width, c.height, c.clientWidth, c.clientHeight] });
    await page.addStyleTag({ content: ".tools{height:150px}" }); await settle(); seen.squeezed = await fits();   // as when the list of keys opens
    await page.setViewportSize({ width: 700, height: 420 }); await shot("resized"); seen.resized = await fits();
    await page.evaluate(() => { document.getElementById("scene").getContext("webgl2").getExtension("WEBGL_lose_context").loseContext() }); await page.waitForFunction(() => document.getElementById("message").textContent.includes("lost"), null, { timeout: 30000 }).catch(() => 0);
    seen.lost = await page.textContent("#message"); seen.poster = await page.locator("#poster").isVisible();
    Object.assign(seen, { said, requests }); await close();
    const phone = await open(browser, url, { width: 390, height: 780 }, { hasTouch: true, isMobile: true });
    seen.phone = { overflow: await overflow(phone.page), said: phone.said, ...await phone.page.evaluate(() => { const c = document.getElementById("scene"); return { canvas: [c.clientWidth, c.clientHeight], tools: Math.round(document.querySelector(".tools").getBoundingClientRect().bottom), plain: document.body.classList.contains("plain") } }) };
    await phone.page.screenshot({ path: path.join(folder, "phone.png") });
    const area = phone.page.locator("#scene"), other = async last => { let now; for (let i = 0; i < 50 && (now = sum(await area.screenshot())) === last; i++) await wait(100); return now }, before = sum(await area.screenshot()), touch = await phone.page.context().newCDPSession(phone.page), at = await area.boundingBox();
    const finger = (kind, ...points) => touch.send("Input.dispatchTouchEvent", { type: kind, touchPoints: points.map(([dx, dy], id) => ({ x: at.x + at.width / 2 + dx, y: at.y + at.height / 2 + dy, id })) });
    await finger("touchStart", [0, 0]); await finger("touchMove", [40, 10]); await finger("touchEnd"); await wait(300); const turned = await other(before);
    await finger("touchStart", [-20, 0], [20, 0]); await finger("touchMove", [-60, 0], [60, 0]); await finger("touchEnd"); await wait(300); const pinched = await other(turned);
    seen.phone.touch = turned !== before; seen.phone.pinch = pinched !== turned; await phone.close();
    return seen;
  },

  // a report: what it says, whether its clips play, how it fits on a telephone
  async report(browser, url) {
    const { page, said, requests, close } = await open(browser, url), seen = { said, requests };
    seen.images = await page.evaluate(() => [...document.images].map(i => i.complete && i.naturalWidth > 0));
    const clock = () => page.evaluate(() => [...document.querySelectorAll("video")].map(v => v.currentTime));
    await page.evaluate(() => document.querySelectorAll("video").forEach(v => v.scrollIntoView() ?? v.play().catch(() => 0)));
    const before = await clock(); seen.videos = before.map(() => false);
    for (let i = 0; i < 300 && seen.videos.includes(false); i++) { await wait(200); (await clock()).forEach((t, k) => { seen.videos[k] ||= t !== before[k] }) }
    await page.keyboard.press("Tab"); seen.focus = await page.evaluate(() => document.activeElement.tagName);
    const details = page.locator("details > summary").first();
    if (await details.count()) { await details.focus(); await page.keyboard.press("Enter"); seen.opened = await page.evaluate(() => document.querySelector("details").open) }
    await page.evaluate(() => document.querySelectorAll("details").forEach(d => { d.open = true }));
    await page.setViewportSize({ width: 390, height: 780 }); seen.phone = await overflow(page); await page.screenshot({ path: path.join(folder, "report.png") }); await close();
    return seen;
  },

  // the index of all runs
  async index(browser, url) {
    const { page, said, requests, close } = await open(browser, url, { width: 1300, height: 600 }), seen = { said, requests, orders: {} };
    const rows = () => page.evaluate(() => [...document.querySelectorAll("tbody tr")].filter(r => !r.hidden).map(r => r.cells[0].querySelector("small").textContent));
    const statuses = () => page.evaluate(() => [...document.querySelectorAll("tbody tr")].filter(r => !r.hidden).map(r => r.cells[1].textContent));
    seen.first = await rows(); seen.statuses = await statuses();
    const took = page.locator("th", { hasText: "took" }), started = page.locator("th", { hasText: "started" });
    await took.click(); seen.orders.took = await rows(); await took.click(); seen.orders.took_down = await rows();
    await started.focus(); await page.keyboard.press("Enter"); seen.orders.started = await rows(); await page.keyboard.press(" "); seen.orders.started_down = await rows(); seen.aria = await started.getAttribute("aria-sort"); seen.took_aria = await took.getAttribute("aria-sort");
    await page.locator("input[type=search]").fill("RUNNING"); seen.filtered = await statuses(); await page.locator("input[type=search]").fill("");
    await page.locator("body").click({ position: { x: 2, y: 2 } }); seen.tabs = [];
    for (let i = 0; i < 4; i++) { await page.keyboard.press("Tab"); seen.tabs.push(await page.evaluate(() => document.activeElement.tagName)) }
    await page.setViewportSize({ width: 390, height: 780 }); seen.phone = await overflow(page); await page.screenshot({ path: path.join(folder, "index.png") });
    await page.setViewportSize({ width: 1300, height: 600 }); await page.locator("tbody a", { hasText: options.follow }).first().click(); await page.waitForLoadState(); seen.followed = await page.textContent("h1"); seen.status = await page.textContent("header .status"); await close();
    return seen;
  },

  // the committed reports: filter, order, pictures, and into one of them and back
  async gallery(browser, url) {
    const { page, said, requests, close } = await open(browser, url, { width: 1300, height: 900 }), seen = { said, requests };
    const shown = key => page.evaluate(k => [...document.querySelectorAll(".card")].filter(c => !c.hidden).map(c => c.dataset[k]), key);
    seen.files = await shown("file"); seen.pictures = await page.evaluate(async () => { const all = [...document.images]; all.forEach(i => { i.loading = "eager" }); await Promise.all(all.map(i => i.decode().catch(() => 0))); return all.map(i => i.naturalWidth > 0) });
    seen.focus = []; for (let i = 0; i < 3; i++) { await page.keyboard.press("Tab"); seen.focus.push(await page.evaluate(() => document.activeElement.tagName)) }
    await page.locator("select").selectOption("title"); seen.by_title = await shown("title");
    await page.locator("input[type=search]").fill(options.word.toUpperCase()); seen.filtered = await shown("file"); seen.count = await page.textContent("#count");
    await page.locator(".card:not([hidden]) a").first().click(); await page.waitForLoadState(); seen.opened = await page.textContent("h1");
    await page.locator("p.crumb a").click(); await page.waitForLoadState(); seen.back = await page.textContent("h1");
    await page.setViewportSize({ width: 390, height: 780 }); seen.phone = await overflow(page); await page.screenshot({ path: path.join(folder, "gallery.png") }); await close();
    return seen;
  },

  // from the index to the page of a running run, which renews itself until it is final
  async live(browser, url) {
    const { page, said, requests, close } = await open(browser, url, { width: 1300, height: 900 }), seen = { said, requests, looks: [], loads: 0 };
    page.on("load", () => seen.loads++);
    seen.listed = await page.evaluate(() => [...document.querySelectorAll("tbody tr")].map(r => r.cells[1].textContent));
    await page.locator("tbody a", { hasText: options.follow }).first().click(); await page.waitForLoadState();
    const look = () => page.evaluate(() => ({ status: document.querySelector("header .status").textContent, words: document.querySelector(".now b")?.textContent, share: document.querySelector("progress")?.value,
      elapsed: document.getElementById("elapsed")?.textContent, curves: document.querySelectorAll("main svg").length, log: document.querySelector("main.live pre")?.textContent.length || 0 }));
    const again = async () => { for (;;) try { return await look() } catch (e) { if (!/context was destroyed|navigation/i.test(e.message)) throw e; await wait(50) } };   // it loads just now
    seen.first = await again(); const shot = name => page.screenshot({ path: path.join(folder, name + ".png"), timeout: 3000 }).catch(() => 0);   // a page that loads again may not hold still
    await shot("live_first");
    for (const end = Date.now() + options.patience * 1000; Date.now() < end; await wait(300)) {
      const now = await again(), last = seen.looks.at(-1);
      if (!last || JSON.stringify({ ...now, elapsed: 0 }) !== JSON.stringify({ ...last, elapsed: 0 })) { seen.looks.push(now); if (now.curves && now.status === "running") await shot("live") }
      if (now.status !== "running") break;
    }
    await wait(500); const loads = seen.loads; await wait(4500); seen.rests = seen.loads === loads; seen.title = await page.textContent("h1"); seen.sections = await page.locator("main h2").count();
    await page.setViewportSize({ width: 390, height: 780 }); seen.phone = await overflow(page); await page.screenshot({ path: path.join(folder, "live_last.png") });
    await page.locator("a", { hasText: "all runs" }).click(); await page.waitForLoadState(); seen.listed_last = await page.evaluate(() => [...document.querySelectorAll("tbody tr")].map(r => r.cells[1].textContent)); await close();
    return seen;
  },

  // camera paths to turn, and the time
  async cameras(browser, url) {
    const { page, said, requests, close } = await open(browser, url, { width: 900, height: 700 }), canvas = page.locator("canvas").first(), seen = { said, requests, steps: {} };
    const settle = () => page.evaluate(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))));
    const now = async () => { await settle(); return page.evaluate(() => document.querySelector("canvas").toDataURL()) }, step = async (name, act) => { const before = await now(); await act(); for (let i = 0; i < 100 && !(seen.steps[name] = await now() !== before); i++) await wait(50) };
    const frame = async () => { await settle(); return page.evaluate(() => ({ at: +document.querySelector("input").value, picture: document.querySelector(".cameras img").src.slice(-60), said: document.querySelector("input").getAttribute("aria-valuetext") })) };
    const press = async (...keys) => { for (const k of keys) await page.keyboard.press(k); return frame() };
    seen.drawn = await page.evaluate(() => { const c = document.querySelector("canvas"); return c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some(v => v > 0) });
    await page.keyboard.press("Tab"); seen.focus = await page.evaluate(() => document.activeElement.tagName);
    for (const k of ["ArrowLeft", "ArrowUp", "+", "-"]) await step(k, () => page.keyboard.press(k));
    seen.frames = [await frame(), await press("."), await press(","), await press("End"), await press("Home")];
    await page.keyboard.press("Tab"); seen.button = await page.evaluate(() => document.activeElement.tagName); await press("Enter"); const times = new Set();
    for (let i = 0; i < 600 && times.size < 3; i++) { await wait(50); times.add((await frame()).at) }
    await press("Enter"); const still = (await frame()).at; await wait(400); seen.played = times.size; seen.stopped = (await frame()).at === still;
    await page.keyboard.press("Tab"); seen.slider = [await press("Home"), await press("ArrowRight"), await press("End")]; await step("slider", () => page.keyboard.press("Home"));
    const box = await canvas.boundingBox(); await step("drag", async () => { await page.mouse.move(box.x + 50, box.y + 50); await page.mouse.down(); await page.mouse.move(box.x + 90, box.y + 60); await page.mouse.up() });
    await step("wheel", async () => { await page.mouse.wheel(0, 200); await wait(200) });
    await page.setViewportSize({ width: 390, height: 780 }); seen.phone = await overflow(page); await page.screenshot({ path: path.join(folder, "cameras.png") }); await close();
    return seen;
  },

  // a notebook in JupyterLab: run all of it, and move its camera widget by keyboard
  async lab(browser, url) {
    const { page, said, close } = await open(browser, url, { width: 1300, height: 1000 }), seen = { said };
    await page.locator(".jp-NotebookPanel .jp-Cell").first().waitFor({ timeout: 90000 });
    await page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first().waitFor({ timeout: 90000 }).catch(() => { seen.slow = true });
    await page.locator(".jp-Cell").first().click(); await page.locator(".lm-MenuBar-item", { hasText: /^Run$/ }).click(); await page.locator(".lm-Menu-item", { hasText: /^Run All Cells$/ }).click();
    const slider = page.locator(".jp-OutputArea-output input[type=range]").first(); await slider.waitFor({ timeout: 120000 });
    const words = () => page.evaluate(() => document.querySelector(".jp-OutputArea-output input[type=range]").getAttribute("aria-valuetext"));
    const picture = () => page.evaluate(() => document.querySelector(".jp-OutputArea-output figure img")?.src.slice(-60)), turned = () => page.evaluate(() => document.querySelector(".jp-OutputArea-output canvas").toDataURL());
    const cell = () => page.evaluate(() => [...document.querySelectorAll(".jp-Notebook .jp-Cell")].findIndex(c => c.classList.contains("jp-mod-active")));
    seen.widgets = await page.locator(".jp-OutputArea-output canvas").count(); await page.waitForFunction(() => document.querySelectorAll(".jp-Notebook .jp-InputPrompt").length && ![...document.querySelectorAll(".jp-InputPrompt")].some(p => p.textContent.includes("*")), null, { timeout: 120000 });
    await slider.scrollIntoViewIfNeeded(); await slider.focus(); 
    const reaches = async start => { for (let i = 0; i < 600 && !(await words()).startsWith(start); i++) await wait(100); return words() };
    await reaches(options.from); await page.keyboard.press("Home"); seen.words = [await reaches("frame 0;")]; seen.pictures = [await picture()]; seen.cell = await cell();
    for (const k of [1, 2, 3]) { await page.keyboard.press("ArrowRight"); seen.words.push(await reaches(`frame ${k};`)); seen.pictures.push(await picture()) }
    await page.locator(".jp-OutputArea-output canvas").first().focus(); const before = await turned(); for (const k of ["ArrowUp", "ArrowUp", "ArrowLeft"]) await page.keyboard.press(k);
    for (let i = 0; i < 300 && !(seen.turned = await turned() !== before); i++) await wait(100);
    seen.last_cell = await cell(); await page.screenshot({ path: path.join(folder, "lab.png") });
    await page.locator(".jp-CodeCell").last().locator(".cm-content").click(); await page.keyboard.press("Shift+Enter");   // the last cell says what Python knows
    await page.waitForFunction(wanted => [...document.querySelectorAll(".jp-OutputArea-output")].at(-1)?.textContent.includes(wanted), options.wanted, { timeout: 120000 }).catch(() => 0);
    seen.told = await page.evaluate(() => [...document.querySelectorAll(".jp-OutputArea-output")].at(-1)?.textContent.trim()); seen.errors = await page.locator("[data-mime-type='application/vnd.jupyter.error']").count(); await close();
    return seen;
  },

  // pages that only have to open: nothing said, nothing fetched
  async silent(browser, url) {
    const seen = {};
    for (const one of options.pages) {
      const { page, said, requests, close } = await open(browser, pathToFileURL(path.resolve(one)).href, options.size);
      await wait(300); seen[path.basename(one)] = { said, requests, plain: await page.evaluate(() => document.body.classList.contains("plain")), text: await page.evaluate(() => document.body.innerText.slice(0, 2000)) }; await close();
    }
    return seen;
  },
};

(async () => {
  const browser = await chromium.launch({ executablePath: process.env.CAMFLOW_CHROMIUM || "chromium", args: FLAGS, timeout: 120000 });
  try { console.log(JSON.stringify(await TASKS[task](browser, /^http:/.test(file) ? file : pathToFileURL(path.resolve(file)).href))) } finally { await browser.close() }
})().catch(e => { console.error(e); process.exit(1) });
