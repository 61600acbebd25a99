// Curves that can be read: the pointer, a finger, the slider and its arrow keys choose a point. Of several
// curves the rows of the table beside them choose one, by pointer or by the arrow keys of its buttons.
for (const box of document.querySelectorAll("[data-curve]")) {
  const curves = [].concat(JSON.parse(box.dataset.curve));
  const svg = box.querySelector("svg"), slider = box.querySelector("input"), out = box.querySelector("output");
  const mark = (name, attributes) => {
    const element = document.createElementNS(svg.namespaceURI, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    return svg.appendChild(element);
  };
  let curve = curves[0];
  const drawn = Object.keys(curve.paths ?? {}).map(name => [name, mark("path", { class: `drawn ${name}` })]);
  const line = mark("line", { class: "mark", y1: curve.ends[0], y2: curve.ends[1] });
  const dot = mark("circle", { class: "mark", r: 2 });
  const show = i => {
    const text = (curve.name === undefined ? "" : `${curve.name}: `) + curve.text[i];
    slider.value = i;
    for (const end of ["x1", "x2"]) line.setAttribute(end, curve.x[i]);
    dot.setAttribute("cx", curve.x[i]);
    dot.setAttribute("cy", curve.y[i]);
    out.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  const choose = number => {
    curve = curves[number];
    for (const [name, path] of drawn) path.setAttribute("d", curve.paths[name]);
    slider.max = curve.x.length - 1;
    show(curve.y.indexOf(Math.min(...curve.y)));
  };
  const point = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const x = curve.x;
    show(x.reduce((best, value, i) => (Math.abs(value - at.x) < Math.abs(x[best] - at.x) ? i : best), 0));
  };
  if (curve.paths)
    [...box.closest("section").querySelectorAll("tbody tr")].slice(0, curves.length).forEach((row, i) => {
      const label = document.createElement("label"), button = document.createElement("input");
      Object.assign(button, { type: "radio", name: "block", checked: i === 0 });
      label.append(button, ...row.cells[0].childNodes);
      row.cells[0].append(label);
      button.addEventListener("change", () => choose(i));
      row.addEventListener("click", event => event.target.closest("label") || button.click());
    });
  slider.addEventListener("input", () => show(+slider.value));
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  box.querySelector(".read").hidden = false;
  choose(0);
}
