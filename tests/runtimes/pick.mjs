// Drives the page of models/web in Chromium: `node pick.mjs SITE IMAGE...` prints what it shows for each, as JSON.

import { launch, serve } from "./browser.mjs";

const [site, ...images] = process.argv.slice(2);
const server = await serve({ "": site });
const browser = await launch();
const shown = { images: {}, asked: [], problems: [] };
try {
  const page = await browser.newPage();
  page.on("request", (request) => shown.asked.push(request.url().replace(server.url, "")));
  page.on("pageerror", (error) => shown.problems.push(String(error)));
  await page.goto(server.url + "index.html");
  await page.waitForFunction(() => state.textContent === "ready" || error.textContent);
  shown.ready = await page.textContent("#error") || "ready";
  for (const image of shown.ready === "ready" ? images : []) {
    await page.setInputFiles("#file", image);
    await page.waitForFunction(() => !file.disabled);
    shown.images[image] = await page.evaluate(() => ({
      error: error.textContent,
      state: state.textContent,
      classes: [...classes.rows].map((row) => [row.cells[0].textContent, row.cells[1].title, row.cells[1].textContent]),
    }));
  }
} finally {
  await browser.close();
  server.close();
}
console.log(JSON.stringify(shown));
