// The interactive picture of `coterie inspect`: point at a token (or tap, or use the arrow keys) to see its group and the keys
// that the group chose, in every head of the block at once.
(() => {
  const MEMBER = "64,126,255", KEY = "#ff8a14", INK = "#10141c", EDGE = "#183ea0";
  const unpack = (text, bits) => {
    const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
    return bits === 8 ? bytes : bits === 16 ? new Uint16Array(bytes.buffer) : new Uint32Array(bytes.buffer);
  };
  const make = (tag, parent, props = {}) => parent.appendChild(Object.assign(document.createElement(tag), props));

  // The image at the canvas's size, once tinted blue (members), once pale and grey (all else).
  const layers = (image, width, height) => {
    const layer = paint => {
      const c = document.createElement("canvas");
      c.width = width; c.height = height;
      const g = c.getContext("2d");
      g.imageSmoothingEnabled = Math.max(image.naturalWidth, image.naturalHeight) > 64;
      paint(g);
      return c;
    };
    return {
      plain: layer(g => g.drawImage(image, 0, 0, width, height)),
      member: layer(g => { g.drawImage(image, 0, 0, width, height); g.fillStyle = `rgba(${MEMBER},.48)`; g.fillRect(0, 0, width, height); }),
      pale: layer(g => {
        g.drawImage(image, 0, 0, width, height);
        g.globalCompositeOperation = "saturation"; g.fillStyle = "#808080"; g.fillRect(0, 0, width, height);
        g.globalCompositeOperation = "source-over"; g.fillStyle = "rgba(236,236,236,.58)"; g.fillRect(0, 0, width, height);
      }),
    };
  };

  const drawGroup = (canvas, layer, block, head, token, big) => {
    const g = canvas.getContext("2d"), [rows, columns] = block.grid, group = head.assignment[token];
    const w = canvas.width / columns, h = canvas.height / rows;
    g.drawImage(layer.pale, 0, 0);
    const cells = new Path2D(), edges = new Path2D(), own = t => head.assignment[t] === group;
    for (let t = 0; t < rows * columns; t++) if (own(t)) {
      const r = Math.floor(t / columns), c = t % columns, x = c * w, y = r * h;
      cells.rect(x, y, w + 0.5, h + 0.5);
      if (c && !own(t - 1)) { edges.moveTo(x, y); edges.lineTo(x, y + h); }
      if (c < columns - 1 && !own(t + 1)) { edges.moveTo(x + w, y); edges.lineTo(x + w, y + h); }
      if (r && !own(t - columns)) { edges.moveTo(x, y); edges.lineTo(x + w, y); }
      if (r < rows - 1 && !own(t + columns)) { edges.moveTo(x, y + h); edges.lineTo(x + w, y + h); }
    }
    g.save(); g.clip(cells); g.drawImage(layer.member, 0, 0); g.restore();
    g.strokeStyle = EDGE; g.lineWidth = big ? 2 : 1; g.stroke(edges);
    const keys = block.k < rows * columns + block.prefix ? head.keys(group) : [], radius = Math.min(Math.max(Math.min(w, h) * 0.3, big ? 3.5 : 2), big ? 11 : 5);
    for (const key of keys) {
      const x = (key % columns + 0.5) * w, y = (Math.floor(key / columns) + 0.5) * h;
      g.beginPath(); g.arc(x, y, radius, 0, 2 * Math.PI);
      g.fillStyle = KEY; g.fill(); g.strokeStyle = INK; g.lineWidth = big ? 1.4 : 0.8; g.stroke();
    }
    const x = token % columns * w, y = Math.floor(token / columns) * h;
    g.lineWidth = big ? 5 : 3; g.strokeStyle = "#fff"; g.strokeRect(x, y, w, h);
    g.lineWidth = big ? 2.5 : 1.5; g.strokeStyle = INK; g.strokeRect(x, y, w, h);
  };

  const drawAll = (canvas, layer, block, head) => {
    const g = canvas.getContext("2d"), [rows, columns] = block.grid, w = canvas.width / columns, h = canvas.height / rows;
    g.drawImage(layer.plain, 0, 0);
    g.globalAlpha = 0.62;
    for (let t = 0; t < rows * columns; t++) {
      const group = head.assignment[t];
      g.fillStyle = `hsl(${(group * 222.4922) % 360} 72% ${[58, 72, 46][group % 3]}%)`;
      g.fillRect(t % columns * w, Math.floor(t / columns) * h, w + 0.5, h + 0.5);
    }
    g.globalAlpha = 1;
  };

  const drawSizes = (box, head, group, pick) => {
    const order = [...head.counts.keys()].sort((a, b) => head.counts[b] - head.counts[a]), most = Math.max(1, head.counts[order[0]]);
    box.replaceChildren();
    for (const index of order) {
      const bar = make("button", box, { type: "button", title: `group ${index}: ${head.counts[index]} tokens`, disabled: !head.counts[index] });
      bar.setAttribute("aria-label", bar.title);
      bar.style.setProperty("--h", `${100 * head.counts[index] / most}%`);
      bar.classList.toggle("on", index === group);
      bar.onclick = () => pick(head.assignment.indexOf(index));
    }
  };

  const start = root => {
    const data = JSON.parse(root.querySelector("script").textContent), image = root.querySelector("img");
    const prefix = block => block.prefix;
    for (const block of data.blocks) for (const head of block.heads) {
      const tokens = unpack(head.assignment, block.group_bits), chosen = unpack(head.selected, block.key_bits);
      head.assignment = tokens.subarray(prefix(block), prefix(block) + block.grid[0] * block.grid[1]);
      head.keys = group => [...chosen.subarray(group * block.k, (group + 1) * block.k)].map(t => t - prefix(block)).filter(t => t >= 0);
      head.counts = new Array(block.groups).fill(0);
      for (const group of head.assignment) head.counts[group]++;
    }
    const state = { block: 0, head: 0, x: 0.5, y: 0.5, all: false };
    const bar = make("div", root, { className: "row" });
    const label = make("label", bar, { textContent: "Block " }), select = make("select", label);
    data.blocks.forEach((block, i) => make("option", select, { value: i, textContent: block.label }));
    const tick = make("label", bar), box = make("input", tick, { type: "checkbox" });
    tick.append(" all groups at once");
    const stage = make("div", root, { className: "stage" }), left = make("div", stage), side = make("div", stage);
    const canvas = make("canvas", left, { tabIndex: 0 });
    canvas.setAttribute("role", "img");
    const info = make("p", side, { className: "info" });
    info.setAttribute("aria-live", "polite");
    make("h3", side, { textContent: "Group sizes, largest first" });
    const sizes = make("div", side, { className: "sizes" });
    make("h3", side, { textContent: "The same token in every head" });
    const strip = make("div", side, { className: "strip" });
    const ratio = image.naturalWidth / image.naturalHeight;
    const fit = (c, side) => { c.width = ratio >= 1 ? side : Math.round(side * ratio); c.height = ratio >= 1 ? Math.round(side / ratio) : side; };
    fit(canvas, 880);
    const small = document.createElement("canvas");
    fit(small, 240);
    const large = layers(image, canvas.width, canvas.height), little = layers(image, small.width, small.height);

    const draw = () => {
      const block = data.blocks[state.block], [rows, columns] = block.grid;
      state.head = Math.min(state.head, block.heads.length - 1);
      const row = Math.min(rows - 1, Math.floor(state.y * rows)), column = Math.min(columns - 1, Math.floor(state.x * columns));
      const token = row * columns + column, head = block.heads[state.head], group = head.assignment[token];
      if (state.all) drawAll(canvas, large, block, head); else drawGroup(canvas, large, block, head, token, true);
      const keys = head.keys(group), reach = keys.filter(k => head.assignment[k] === group).length;
      info.textContent = `${block.label}, head ${state.head + 1}: the token in row ${row + 1}, column ${column + 1} is in group ${group}, ` +
        `with ${head.counts[group]} of ${rows * columns} tokens (an even split would be ${(rows * columns / block.groups).toFixed(1)}). ` +
        (block.k < rows * columns + block.prefix ? `The group attends to ${block.k} keys; ${reach} of them are its own members.` : "With no more tokens than keys, it attends to all of them.");
      canvas.setAttribute("aria-label", info.textContent);
      drawSizes(sizes, head, group, token => { if (token >= 0) { state.x = (token % columns + 0.5) / columns; state.y = (Math.floor(token / columns) + 0.5) / rows; draw(); } });
      if (strip.children.length !== block.heads.length) {
        strip.replaceChildren();
        block.heads.forEach((_, i) => {
          const button = make("button", strip, { type: "button" }), c = make("canvas", button);
          fit(c, 240);
          make("span", button, { textContent: `head ${i + 1}` });
          button.onclick = () => { state.head = i; draw(); };
        });
      }
      block.heads.forEach((other, i) => {
        const button = strip.children[i], c = button.firstChild;
        button.classList.toggle("on", i === state.head);
        button.setAttribute("aria-pressed", i === state.head);
        if (state.all) drawAll(c, little, block, other); else drawGroup(c, little, block, other, token, false);
      });
    };
    let waiting = false;
    const later = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } };
    const point = event => {
      const r = canvas.getBoundingClientRect();
      state.x = Math.min(Math.max((event.clientX - r.left) / r.width, 0), 0.9999);
      state.y = Math.min(Math.max((event.clientY - r.top) / r.height, 0), 0.9999);
      later();
    };
    canvas.addEventListener("pointermove", event => { if (event.pointerType === "mouse") point(event); });
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("keydown", event => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const [rows, columns] = data.blocks[state.block].grid, clamp = v => Math.min(Math.max(v, 0), 0.9999);
      state.x = clamp(state.x + step[0] / columns); state.y = clamp(state.y + step[1] / rows);
      later();
    });
    select.onchange = () => { state.block = +select.value; draw(); };
    box.onchange = () => { state.all = box.checked; draw(); };
    image.hidden = true;
    draw();
  };
  for (const root of document.querySelectorAll(".explorer")) {
    const image = root.querySelector("img");
    image.decode().then(() => start(root));
  }
})();
