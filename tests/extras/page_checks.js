// Returns what a reader of the page would complain about, as a list of sentences.
({ contrast }) => {
  const found = [];
  const name = (e) => `${e.tagName.toLowerCase()} "${(e.textContent || e.getAttribute("alt") || "").trim().slice(0, 40)}"`;
  const visible = (e) => {
    const box = e.getBoundingClientRect();
    return box.width > 0 && box.height > 0 && e.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  };
  const all = [...document.body.querySelectorAll("*")].filter(visible);
  const texts = all.filter((e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  const inSvg = (e) => e.closest("svg") !== null;

  // the page does not scroll sideways; only tables, code and figures do
  const width = document.documentElement.clientWidth;
  if (document.scrollingElement.scrollWidth > width) found.push(`the page is ${document.scrollingElement.scrollWidth} px wide`);
  const clipped = (e) => {
    for (let up = e.parentElement; up && up !== document.body; up = up.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return true;
    return false;
  };
  for (const e of all) if (e.getBoundingClientRect().right > width + 1 && !clipped(e)) found.push(`${name(e)} is cut off`);

  // size and contrast of text
  const scale = (e) => (inSvg(e) && e.getScreenCTM ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1);
  const color = (text) => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (front, back) => [0, 1, 2].map((i) => front[i] * front[3] + back[i] * (1 - front[3]));
  const light = (rgb) =>
    rgb
      .map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
      .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => (e === null ? [255, 255, 255] : over(color(getComputedStyle(e).backgroundColor), behind(e.parentElement)));
  for (const e of texts) {
    const style = getComputedStyle(e);
    const size = parseFloat(style.fontSize) * scale(e);
    if (size < 11.9) found.push(`${name(e)} has ${size.toFixed(1)} px`);
    const back = behind(e);
    const ink = color(inSvg(e) && style.fill.startsWith("rgb") ? style.fill : style.color);
    const [low, high] = [light(over(ink, back)), light(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < contrast) found.push(`${name(e)} has a contrast of ${ratio.toFixed(2)}`);
  }

  // what is tapped is large enough
  for (const e of all.filter((e) => e.matches("button, summary, input, select"))) {
    const box = e.getBoundingClientRect();
    if (Math.min(box.width, box.height) < 24) found.push(`${name(e)} is too small to tap`);
  }

  // images are loaded, have a size and are described
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth || !image.alt) found.push(`image ${image.src} is missing or has no text`);
  const drawings = [...document.querySelectorAll("figure svg")];
  for (const svg of drawings) if (!svg.getAttribute("aria-label")) found.push("a figure has no label");
  for (const figure of document.querySelectorAll("figure:has(svg)"))
    if ([...figure.querySelectorAll("svg")].filter(visible).length !== 1) found.push("a figure does not show one drawing");

  // labels of a figure are inside it, and do not overlap
  for (const svg of drawings.filter(visible)) {
    const frame = svg.getBoundingClientRect();
    const labels = [...svg.querySelectorAll("text")].filter(visible);
    const boxes = labels.map((label) => label.getBoundingClientRect());
    labels.forEach((label, i) => {
      const box = boxes[i];
      if (box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
        found.push(`the label ${name(label)} is cut off`);
      boxes.slice(i + 1).forEach((other, k) => {
        const across = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const along = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        // boxes are higher than the letters in them
        if (across > 1 && along > 0.5 * Math.min(box.height, other.height))
          found.push(`the labels ${name(label)} and ${name(labels[i + 1 + k])} overlap`);
      });
    });
  }

  // headings in order
  const levels = [...document.querySelectorAll("main :is(h1, h2, h3, h4, h5, h6)")].map((heading) => Number(heading.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1) found.push(`there are headings of the levels ${levels}`);
  levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) found.push(`a heading of level ${level} follows ${levels[i - 1]}`); });

  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of new Set(ids.filter((id, i) => ids.indexOf(id) !== i))) found.push(`two elements have the ID ${id}`);
  if (!document.title || !document.documentElement.lang) found.push("the page has no title or language");
  return [...new Set(found)];
};
