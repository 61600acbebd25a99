// Curves that can be read: the pointer, a finger, the slider and its arrow keys choose a point.
for (const box of document.querySelectorAll("[data-curve]")) {
  const { x, y, ends, text } = JSON.parse(box.dataset.curve);
  const svg = box.querySelector("svg"), slider = box.querySelector("input"), out = box.querySelector("output");
  const mark = (name, attributes) => {
    const element = document.createElementNS(svg.namespaceURI, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    return svg.appendChild(element);
  };
  const line = mark("line", { class: "mark", y1: ends[0], y2: ends[1] });
  const dot = mark("circle", { class: "mark", r: 2 });
  const show = i => {
    slider.value = i;
    for (const end of ["x1", "x2"]) line.setAttribute(end, x[i]);
    dot.setAttribute("cx", x[i]);
    dot.setAttribute("cy", y[i]);
    out.textContent = text[i];
    slider.setAttribute("aria-valuetext", text[i]);
  };
  const point = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    show(x.reduce((best, value, i) => (Math.abs(value - at.x) < Math.abs(x[best] - at.x) ? i : best), 0));
  };
  slider.max = x.length - 1;
  slider.addEventListener("input", () => show(+slider.value));
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  box.querySelector(".read").hidden = false;
  show(y.indexOf(Math.min(...y)));
}
