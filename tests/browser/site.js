// Opens the documentation site from the disk in a headless chromium and prints what a reader would meet as JSON: `node site.js FOLDER [OPTIONS as JSON]`; the test judges.
const path = require("path"), { pathToFileURL } = require("url");
const { chromium } = require(require.resolve("playwright-core", { paths: [process.env.CAMFLOW_PLAYWRIGHT, __dirname].filter(Boolean) }));
const [folder, more] = process.argv.slice(2), options = JSON.parse(more);
const address = page => pathToFileURL(path.resolve(folder, page)).href;

(async () => {
  const browser = await chromium.launch({ executablePath: process.env.CAMFLOW_CHROMIUM || "chromium", args: ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage"], timeout: 120000 });
  const seen = { said: [], requests: [], pages: {}, found: {} };
  const open = async (size, scheme = "light") => {
    const context = await browser.newContext({ viewport: size, colorScheme: scheme }), page = await context.newPage();
    page.on("console", m => { if (["error", "warning"].includes(m.type())) seen.said.push(`${page.url()}: ${m.text()}`) });
    page.on("pageerror", e => seen.said.push(`${page.url()}: uncaught ${e.message}`));
    page.on("request", r => { if (!/^(file|data|blob):/.test(r.url())) seen.requests.push(r.url()) });
    page.on("requestfailed", r => seen.said.push("failed: " + r.url().slice(0, 200)));
    return page;
  };
  const look = page => page.evaluate(() => {
    const root = document.documentElement, article = document.querySelector("article"), light = c => (c.match(/[\d.]+/g) || []).slice(0, 3).reduce((a, b) => a + +b, 0) / 3;
    const size = e => e && [e.getBoundingClientRect().width, e.getBoundingClientRect().height];
    return { window: root.clientWidth, page: root.scrollWidth, background: light(getComputedStyle(document.body).backgroundColor), ink: light(getComputedStyle(article).color), title: document.querySelector("h1").textContent,
      broken: [...document.images].filter(i => i.complete && !i.naturalWidth && i.loading !== "lazy").map(i => i.src.slice(0, 100)), images: article.querySelectorAll("img").length, tables: article.querySelectorAll("table").length,
      outputs: article.querySelectorAll(".cell_output").length, formula: size(article.querySelector("math")), menu: [...document.querySelectorAll(".bd-header .nav-link")].filter(e => e.offsetParent).length };
  });
  try {
    const wide = await open({ width: 1300, height: 900 }), dark = await open({ width: 1300, height: 900 }, "dark"), phone = await open({ width: 390, height: 844 });
    for (const one of options.pages) {
      const at = seen.pages[one] = {};
      for (const [name, page] of Object.entries({ wide, dark, phone })) { await page.goto(address(one), { waitUntil: "load" }); at[name] = await look(page) }
    }
    for (const words of options.words) {
      await wide.goto(address("index.html")); await wide.keyboard.press("Control+k");
      await wide.waitForSelector("dialog[open] input"); await wide.keyboard.type(words);
      await Promise.all([wide.waitForURL(/search\.html/), wide.keyboard.press("Enter")]);
      await wide.waitForFunction(() => document.querySelector("#search-results li a"), null, { timeout: 20000 });
      const first = seen.found[words] = await wide.evaluate(() => document.querySelector("#search-results li a").getAttribute("href"));
      await wide.click("#search-results li a"); seen.found[words] = [first, await wide.textContent("h1")];
    }
    await phone.goto(address("index.html")); await phone.click(".primary-toggle"); seen.drawer = await phone.evaluate(() => [...document.querySelectorAll("dialog[open] a, .bd-sidebar-primary.show a")].filter(e => e.offsetParent).map(e => e.textContent.trim()));
    await phone.keyboard.press("Escape");
    await wide.goto(address(options.pages[0])); await wide.click("details.hide summary"); seen.source = await wide.evaluate(() => document.querySelector("details.hide[open] pre").offsetHeight);
    console.log(JSON.stringify(seen));
  } finally { await browser.close() }
})().catch(e => { console.error(e); process.exit(1) });
