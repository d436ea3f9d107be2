// Sorts the tables of a page and enlarges its pictures. The page is whole without it.
"use strict";

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Tables: a header sorts by its column, then in the other direction, then as the page was written.

// The text of a cell without the remark below it.
function readCell(cell) {
  return [...cell.childNodes].filter(node => node.nodeName !== "SMALL").map(node => node.textContent).join("").trim();
}

// The number that a text begins with, or its seconds; null if it is none. What follows, such as ± and %, is left out.
function parseNumber(text) {
  const time = /^(?:(\d+) h )?(\d+) min(?: (\d+) s)?$/.exec(text);
  if (time) return 3600 * (time[1] || 0) + 60 * time[2] + Number(time[3] || 0);
  const found = /^[+\-−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[+-]?\d+)?(?=$|[\s%±[(])/i.exec(text);
  return found ? Number(found[0].replace("−", "-").replaceAll(",", "")) : null;
}

// The keys of a column: numbers where all cells with a word have one. Cells without a value are null, and last.
function readKeys(rows, column, isNumeric) {
  const texts = rows.map(row => readCell(row.cells[column]));
  const numbers = texts.map(parseNumber), present = texts.map(text => !["", "–", "-"].includes(text));
  const all = isNumeric
    ? numbers.some(number => number !== null)
    : texts.every((_, k) => !present[k] || numbers[k] !== null);
  return all ? numbers : texts.map((text, k) => present[k] ? text : null);
}

function compareKeys(a, b) {
  return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
}

function prepareTable(table) {
  const body = table.tBodies[0], written = [...body.rows], heads = [...table.tHead.rows[0].cells];
  if (written.length < 2) return;
  const keys = heads.map((head, column) => readKeys(written, column, head.classList.contains("number")));
  const choice = make("select", {}, make("option", { value: "" }, "as written"));

  function sort(column, direction) {
    heads.forEach((head, k) => head.setAttribute("aria-sort", k === column ? direction : "none"));
    choice.value = direction === "none" ? "" : `${column} ${direction}`;
    const order = written.map((_, k) => k), sign = direction === "descending" ? -1 : 1, own = keys[column];
    if (direction !== "none") {
      order.sort((a, b) => own[a] === null || own[b] === null
        ? (own[a] === null) - (own[b] === null) : sign * compareKeys(own[a], own[b]));
    }
    body.append(...order.map(k => written[k]));
  }

  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    // Of numbers, the largest are asked for first.
    const isNumber = keys[column].some(key => typeof key === "number");
    const first = isNumber ? "descending" : "ascending", second = isNumber ? "ascending" : "descending";
    const name = head.textContent.trim();
    const button = make("button", { type: "button", class: "sort" }, ...head.childNodes);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      sort(column, now === first ? second : now === second ? "none" : first);
    });
    head.append(button);
    head.setAttribute("aria-sort", "none");
    for (const direction of [first, second]) {
      const words = isNumber
        ? { descending: "largest first", ascending: "smallest first" }
        : { descending: "Z to A", ascending: "A to Z" };
      choice.append(make("option", { value: `${column} ${direction}` }, `${name}, ${words[direction]}`));
    }
  });
  // Phones show no headers.
  choice.addEventListener("change", () => {
    const [column, direction] = choice.value.split(" ");
    sort(Number(column || 0), direction || "none");
  });
  table.parentElement.before(make("label", { class: "sorter" }, "Sort by ", choice));
}

// Pictures: a click, or Enter on the button beside one, opens it in a window of the page. Esc closes it.

const shown = { items: [], at: 0 };
let viewer = null;

function makeViewer() {
  const button = (name, label, text) => make("button", { type: "button", name, "aria-label": label }, text);
  const stage = make("div", { class: "stage", tabindex: "0", autofocus: "" }), text = make("p", {});
  const bar = make("div", { class: "viewer-bar" }, text, button("size", "Whole picture or full size", "1:1"),
    button("back", "Picture before", "‹"), button("on", "Next picture", "›"), button("close", "Close", "×"));
  viewer = make("dialog", { class: "viewer", "aria-label": "Picture" }, bar, stage);
  document.body.append(viewer);
  bar.addEventListener("click", event => {
    const name = event.target.name;
    if (name === "close") viewer.close();
    if (name === "size") viewer.classList.toggle("full");
    if (name === "back" || name === "on") show(shown.at + (name === "on" ? 1 : -1));
  });
  stage.addEventListener("click", event => {
    if (event.target === stage) viewer.close();
    else viewer.classList.toggle("full");
  });
  viewer.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && !viewer.classList.contains("full")) show(shown.at + step);
  });
  viewer.addEventListener("close", () => {
    stage.replaceChildren();
    shown.items[shown.at].opener.focus();
  });
}

function show(number) {
  if (number < 0 || number >= shown.items.length) return;
  if (!viewer) makeViewer();
  const { images, text } = shown.items[number], stage = viewer.querySelector(".stage");
  shown.at = number;
  const space = document.documentElement.clientWidth, widest = Math.max(...images.map(image => image.naturalWidth));
  const copies = images.map(image => make("img", { src: image.src, alt: image.alt || text }));
  copies.forEach((copy, k) => {
    const { naturalWidth, naturalHeight } = images[k];
    copy.style.setProperty("--natural", naturalWidth);
    copy.style.setProperty("--ratio", naturalWidth / naturalHeight);
    copy.style.setProperty("--full", naturalWidth > space ? `${naturalWidth}px` : "calc(1.5 * var(--fit))");
  });
  stage.replaceChildren(...copies);
  // On a phone a wide picture has its full size at once.
  viewer.classList.toggle("full", images.length === 1 && widest > 1.5 * space);
  viewer.style.setProperty("--many", images.length);
  viewer.querySelector("p").textContent = text;
  viewer.querySelector("[name=back]").disabled = number === 0;
  viewer.querySelector("[name=on]").disabled = number === shown.items.length - 1;
  viewer.querySelector("[name=size]").disabled = images.length > 1;
  if (!viewer.open) viewer.showModal();
  stage.scrollTo(0, 0);
}

// Adds the button that opens images to `place`.
function addOpener(place, images, text) {
  const opener = make("button", { type: "button", class: "zoom", "aria-label": `Enlarge: ${text}` });
  const number = shown.items.push({ images, text, opener }) - 1;
  opener.addEventListener("click", () => show(number));
  images.forEach(image => image.addEventListener("click", () => show(number)));
  place.prepend(opener);
}

document.querySelectorAll("table").forEach(prepareTable);
document.querySelectorAll("figure > .card, .strip li").forEach(holder => {
  const inStrip = holder.matches("li");
  const caption = inStrip ? holder.querySelector("small") : holder.parentElement.querySelector("figcaption");
  addOpener(inStrip ? holder : caption, [...holder.querySelectorAll("img")], caption.textContent.trim());
});

// Maps: Tab reaches one point of a map, and the arrow keys reach the others, from left to right.
document.querySelectorAll(".map").forEach(map => {
  const points = [...map.querySelectorAll("[tabindex]")];
  points.sort((a, b) => parseFloat(a.style.left) - parseFloat(b.style.left));
  map.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], next = points[points.indexOf(event.target) + (step || 0)];
    if (!step || !next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
});
