"use strict";

/* Coordinates: x and y are level-0 pixels of the slide; at the pyramid's last zoom they are Leaflet's own pixels. */

const PALETTE = ["#1668b0", "#c8650a", "#1d8062", "#98407f", "#7d6608", "#59636e"];
const CLOSER_THAN_THE_SCAN = 3; // zoom levels beyond one screen pixel per scanned one
const BAR_PX = 150; // the scale bar is at most this long
const CONTOURS_ON_DEMAND_BYTES = 30e6;
const MAGNIFICATIONS = [40, 20, 10, 5, 2.5, 1.25];

const element = (id) => document.getElementById(id);
const whole = (number) => Math.round(number).toLocaleString("en").replaceAll(",", " ");
const percent = (value) => {
  if (value === null) return "–";
  return value > 0 && value < 0.001 ? "< 0.1 %" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
};

function make(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function fail(message) {
  element("failure").textContent = message;
  element("failure").hidden = false;
}

async function fetchJson(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path.split("?")[0]}: ${response.status} ${response.statusText}`);
  return response.json();
}

/** 1, 2 or 5 times a power of ten: the largest one not above `limit`. */
function roundLength(limit) {
  const power = 10 ** Math.floor(Math.log10(limit));
  return [5, 2, 1].find((factor) => factor * power <= limit) * power;
}

function lengthText(micrometers) {
  return micrometers >= 1000 ? `${micrometers / 1000} mm` : `${Number(micrometers.toPrecision(3))} µm`;
}

class SlideMap {
  constructor(slide) {
    this.slide = slide;
    this.map = L.map("map", {
      crs: L.CRS.Simple, attributionControl: false, zoomControl: false, zoomSnap: 0.25, zoomDelta: 1,
      wheelPxPerZoomLevel: 110, minZoom: -9, maxZoom: slide.max_zoom + CLOSER_THAN_THE_SCAN, maxBoundsViscosity: 0.6,
      zoomAnimationThreshold: 6,
    });
    L.control.zoom({ position: "topright" }).addTo(this.map);
    this.bounds = this.box(0, 0, slide.width, slide.height);
    this.map.setMaxBounds(this.bounds.pad(0.6));
    this.addTiles();
  }

  place(x, y) { return this.map.unproject([x, y], this.slide.max_zoom); }

  position(place) { return this.map.project(place, this.slide.max_zoom); }

  box(x, y, width, height) { return L.latLngBounds(this.place(x, y), this.place(x + width, y + height)); }

  /** Slide pixels per screen pixel. */
  get downsample() { return 2 ** (this.slide.max_zoom - this.map.getZoom()); }

  addTiles() {
    const { slide } = this;
    const finer = window.devicePixelRatio >= 1.5 ? 1 : 0; // a dense screen gets the next finer level
    const tiles = L.tileLayer("tiles/{z}/{x}/{y}.jpeg", {
      tileSize: slide.tile_px / 2 ** finer, zoomOffset: finer, minNativeZoom: -finer,
      maxNativeZoom: slide.max_zoom - finer, minZoom: -9, maxZoom: slide.max_zoom + CLOSER_THAN_THE_SCAN,
      bounds: this.bounds, noWrap: true, keepBuffer: 3,
    });
    tiles.on("tileloadstart", ({ tile, coords }) => { // tiles overlap, and are cut at the border: no stretching
      const factor = 2 ** (slide.max_zoom - coords.z - finer);
      for (const [side, length, index] of [["width", slide.width, coords.x], ["height", slide.height, coords.y]]) {
        const left = Math.ceil(length / factor) - index * slide.tile_px;
        tile.style[side] = `${Math.min(slide.tile_px + slide.overlap_px, left) / 2 ** finer}px`;
      }
    });
    tiles.on("tileerror", () => fail("A part of the slide could not be loaded. Is `medkd slide view` still running?"));
    tiles.on("load", () => { document.body.dataset.tiles = "loaded"; });
    tiles.on("loading", () => { document.body.dataset.tiles = "loading"; });
    tiles.addTo(this.map);
  }

  fit() { this.map.fitBounds(this.area(), { padding: [24, 24], animate: false }); }

  /** Where the scanner looked: a slide may be mostly empty around it. */
  area() {
    const [x, y, width, height] = this.slide.bounds;
    return width > 0 && height > 0 ? this.box(x, y, width, height) : this.bounds;
  }
}

/* ---- what the panel says about the slide ---- */

function showFacts(slide) {
  element("file").textContent = slide.file;
  document.title = `${slide.file} · medkd`;
  element("version").textContent = slide.version;
  element("leaflet-version").textContent = L.version;
  const millimeters = (pixels) => ((pixels * slide.mpp) / 1000).toFixed(pixels * slide.mpp < 10000 ? 2 : 1);
  const facts = [["Size", `${whole(slide.width)} × ${whole(slide.height)} px`]];
  if (slide.mpp) facts[0][1] += `\n${millimeters(slide.width)} × ${millimeters(slide.height)} mm`;
  facts.push(["Resolution", slide.mpp ? `${Number(slide.mpp.toPrecision(4))} µm/px (${slide.mpp_source})` : "unknown: no lengths are shown"]);
  facts.push(slide.objective_power ? ["Scanned", `at ${slide.objective_power}×, ${slide.vendor}`] : ["Format", slide.vendor]);
  element("facts").append(...facts.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
}

/* ---- scale bar, magnification, position ---- */

function addScale({ map, slide }, view) {
  const update = () => {
    const unitPerPx = view.downsample * (slide.mpp ?? 1);
    const length = roundLength(BAR_PX * unitPerPx);
    element("scale-text").textContent = slide.mpp ? lengthText(length) : `${whole(length)} px`;
    element("scale-bar").style.width = `${length / unitPerPx}px`;
    element("map").dataset.zoom = map.getZoom();
    element("magnification").textContent = slide.mpp
      ? `${Number((10 / (slide.mpp * view.downsample)).toPrecision(3))}×`
      : `1 : ${Number(view.downsample.toPrecision(3))}`;
  };
  map.on("zoomend viewreset", update);
  update();
  map.on("mousemove", ({ latlng }) => {
    const { x, y } = view.position(latlng);
    const inside = x >= 0 && y >= 0 && x < slide.width && y < slide.height;
    element("position").textContent = inside ? `x ${whole(Math.floor(x))}, y ${whole(Math.floor(y))} px` : "";
  });
  map.on("mouseout", () => { element("position").textContent = ""; });
}

function addMagnifications({ map, slide }, view) {
  const native = slide.mpp ? 10 / slide.mpp : 1;
  const wanted = slide.mpp ? MAGNIFICATIONS : [1, 1 / 4, 1 / 16];
  const buttons = wanted.filter((power) => power <= native * 1.1).slice(0, 5).map((power) => { // what fits in a row
    const exact = slide.max_zoom - Math.log2(native / power);
    const zoom = Math.abs(exact - Math.round(exact)) < 0.05 ? Math.round(exact) : exact; // sharp where it can be
    const button = make("button", { type: "button", textContent: slide.mpp ? `${power}×` : `1 : ${1 / power}` });
    button.addEventListener("click", () => {
      map.options.zoomSnap = 0; // 40/3 and the like are between the steps
      map.setZoom(zoom);
      map.options.zoomSnap = 0.25;
    });
    return [button, zoom];
  });
  const fit = make("button", { type: "button", textContent: "Fit", id: "fit" });
  fit.addEventListener("click", () => view.fit());
  element("magnifications").append(fit, ...buttons.reverse().map(([button]) => button));
  map.on("zoomend", () => buttons.forEach(([button, zoom]) => {
    button.setAttribute("aria-pressed", String(Math.abs(map.getZoom() - zoom) < 0.02));
  }));
}

function addNavigator({ map, slide }, view) {
  const [box, image, frame] = ["navigator", "overview", "frame"].map(element);
  image.src = "overview.jpeg";
  const update = () => {
    const seen = map.getBounds();
    const first = view.position(seen.getNorthWest());
    const last = view.position(seen.getSouthEast());
    const share = (value, length) => Math.min(1, Math.max(0, value / length));
    const [left, right] = [first.x, last.x].map((x) => 100 * share(x, slide.width));
    const [top, bottom] = [first.y, last.y].map((y) => 100 * share(y, slide.height));
    Object.assign(frame.style, { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` });
    frame.hidden = right - left > 99.9 && bottom - top > 99.9;
  };
  map.on("move zoomend resize", update);
  image.addEventListener("load", update);
  const go = (event) => {
    const area = image.getBoundingClientRect();
    const [x, y] = [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
    map.panTo(view.place(x * slide.width, y * slide.height), { animate: false });
  };
  box.addEventListener("pointerdown", (event) => { box.setPointerCapture(event.pointerId); go(event); });
  box.addEventListener("pointermove", (event) => { if (event.buttons) go(event); });
}

/** The view is kept in the address, so that reloading the page or sending it on shows the same place. */
function keepPlace({ map }, view) {
  map.on("moveend", () => {
    const center = view.position(map.getCenter());
    history.replaceState(null, "", `#${Math.round(center.x)},${Math.round(center.y)},${map.getZoom().toFixed(2)}`);
  });
  const [x, y, zoom] = location.hash.slice(1).split(",").map(Number);
  if (location.hash && [x, y, zoom].every(Number.isFinite)) map.setView(view.place(x, y), zoom, { animate: false });
  else view.fit();
}

/* ---- the prediction ---- */

function addHeatmap({ map, slide }, view, heatmap) {
  const [toggle, slider] = ["heatmap-on", "heatmap-opacity"].map(element);
  const layer = L.imageOverlay("heatmap.png", view.box(...heatmap.extent), { className: "heatmap", opacity: slider.value / 100 });
  layer.on("error", () => fail("The heatmap could not be loaded."));
  layer.on("add", () => { layer.getElement().style.clipPath = insideSlide(heatmap.extent, slide); });
  const update = () => {
    layer.setOpacity(slider.value / 100);
    element("heatmap-percent").textContent = `${slider.value} %`;
    if (toggle.checked) layer.addTo(map);
    else layer.remove();
  };
  toggle.addEventListener("change", update);
  slider.addEventListener("input", update);
  element("heatmap-class").textContent = heatmap.class ? `of ${heatmap.class}` : "";
  if (heatmap.legend.length > 1) {
    element("legend").hidden = false;
    element("legend-colors").style.background = `linear-gradient(to right, ${heatmap.legend.join(", ")})`;
  }
  element("heatmap-control").hidden = false;
  toggle.checked = true;
  update();
}

/** Cuts off what reaches past the slide, as the last tiles of a row do. */
function insideSlide([x, y, width, height], slide) {
  const share = (past, length) => `${(100 * Math.max(0, past)) / length}%`;
  const [right, bottom] = [x + width - slide.width, y + height - slide.height];
  return `inset(${share(-y, height)} ${share(right, width)} ${share(bottom, height)} ${share(-x, width)})`;
}

class Contours {
  constructor({ map, slide }, view, colors) {
    this.map = map;
    this.slide = slide;
    this.view = view;
    this.colors = colors;
    this.groups = new Map();
    this.toggle = element("contours-on");
    this.toggle.addEventListener("change", () => this.update());
    element("contours-control").hidden = false;
    this.toggle.checked = slide.overlay.contours_bytes <= CONTOURS_ON_DEMAND_BYTES;
    if (!this.toggle.checked) this.say(`${(slide.overlay.contours_bytes / 1e6).toFixed(0)} MB, loaded when switched on`);
    this.update();
  }

  say(text) { element("contours-state").textContent = text; }

  async update() {
    if (this.toggle.checked && !this.loading) await (this.loading = this.load());
    for (const { layer, box } of this.groups.values()) {
      if (this.toggle.checked && box.checked) layer.addTo(this.map);
      else layer.remove();
    }
  }

  async load() {
    this.say("Loading…");
    try {
      this.show(await fetchJson("contours.geojson"));
    } catch (error) {
      this.say("");
      fail(`The contours could not be loaded (${error.message}).`);
    }
  }

  show(collection) {
    // The tiles have their own way: the heatmap, and the pointer.
    const features = (collection.features ?? [collection].flat()).filter(({ properties }) => properties?.objectType !== "tile");
    // QuPath counts from the corner of the scanned area; the slide counts from its own.
    const [left, top] = this.slide.bounds;
    const renderer = L.canvas({ padding: 0.3 });
    const byClass = Map.groupBy ? Map.groupBy(features, className) : groupBy(features, className);
    for (const [name, members] of byClass) {
      const color = cssColor(members[0].properties?.classification?.color) ?? this.colors.of(name);
      this.colors.set(name, color);
      const layer = L.geoJSON({ type: "FeatureCollection", features: members }, {
        renderer, interactive: false, coordsToLatLng: ([x, y]) => this.view.place(x + left, y + top),
        pointToLayer: (_, place) => L.circleMarker(place, { renderer, radius: 3, interactive: false }),
        style: { color, weight: 2, opacity: 0.95, fillOpacity: 0, interactive: false },
      });
      const box = make("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => this.update());
      const swatch = make("span", { className: "swatch" });
      swatch.style.background = color;
      const count = make("span", { className: "count", textContent: whole(members.length) });
      element("classes").append(make("li", {}, make("label", {}, box, swatch, make("span", { textContent: name }), count)));
      this.groups.set(name, { layer, box });
    }
    this.say(features.length ? "" : "None: nothing was found on this slide.");
    element("contours-control").dataset.loaded = features.length;
  }
}

function className(feature) { return feature.properties?.classification?.name ?? "unclassified"; }

function groupBy(items, keyOf) {
  const groups = new Map();
  for (const item of items) groups.set(keyOf(item), [...(groups.get(keyOf(item)) ?? []), item]);
  return groups;
}

function cssColor(color) {
  return Array.isArray(color) ? `rgb(${color.slice(0, 3).map(Number).join(" ")})` : null;
}

class ClassColors {
  constructor(classes, stated) {
    this.colors = new Map(classes.map((name, index) => [name, cssColor(stated[name]) ?? PALETTE[index % PALETTE.length]]));
  }

  of(name) { return this.colors.get(name) ?? PALETTE[this.colors.size % PALETTE.length]; }

  set(name, color) { this.colors.set(name, color); }
}

/** Outlines the tile under the pointer and shows what the model said about it. */
class TileReader {
  constructor({ map, slide }, view, colors) {
    this.map = map;
    this.view = view;
    this.colors = colors;
    this.bars = new Map();
    this.outline = L.rectangle(view.bounds, { color: "#111", weight: 2, fill: false, interactive: false, className: "tile-outline" });
    this.outline.bindTooltip("", { permanent: true, direction: "top", className: "verdict", offset: [0, -3], opacity: 1 });
    map.on("mousemove", ({ latlng }) => { this.wanted = view.position(latlng); this.ask(); });
    map.on("mouseout", () => { this.wanted = null; this.show(null); });
    element("tile-control").hidden = false;
    this.makeBars(slide.overlay.classes);
  }

  /** One question at a time, always about the latest position. */
  async ask() {
    if (this.asking) return;
    this.asking = true;
    try {
      while (this.wanted) {
        const { x, y } = this.wanted;
        this.wanted = null;
        const tile = await fetchJson(`tile.json?x=${x.toFixed(1)}&y=${y.toFixed(1)}`);
        this.show(tile);
      }
    } catch {
      this.show(null); // the tiles of the slide report a server that is gone
    } finally {
      this.asking = false;
    }
  }

  makeBars(classes) {
    for (const name of classes) {
      const fill = make("i");
      const value = make("b", { textContent: "–" });
      const row = make("div", { className: "bar" }, make("span", { textContent: name, title: name }), make("div", {}, fill), value);
      this.bars.set(name, { row, fill, value });
    }
    element("tile").replaceChildren(...[...this.bars.values()].map(({ row }) => row));
  }

  show(tile) {
    const said = Object.entries(tile?.probabilities ?? {});
    const [bestName, best] = said.reduce((a, b) => ((b[1] ?? -1) > (a[1] ?? -1) ? b : a), ["", null]);
    for (const [name, { row, fill, value }] of this.bars) {
      const probability = tile?.probabilities[name] ?? null;
      fill.style.width = `${100 * (probability ?? 0)}%`;
      fill.style.background = this.colors.of(name);
      value.textContent = percent(probability);
      row.classList.toggle("first", best !== null && name === bestName);
    }
    if (!tile) {
      this.outline.remove();
      return;
    }
    this.outline.setBounds(this.view.box(tile.x, tile.y, tile.width, tile.height)).addTo(this.map);
    const textContent = best === null ? "not read" : `${bestName} ${percent(best)}`;
    this.outline.setTooltipContent(make("span", { textContent })); // as a node: a class name is no HTML
    this.outline.openTooltip(this.view.place(tile.x + tile.width / 2, tile.y));
  }
}

class StrongestTiles {
  constructor({ map, slide }, view, reader) {
    this.map = map;
    this.slide = slide;
    this.view = view;
    this.reader = reader;
    this.select = element("strongest-class");
    const { classes } = slide.overlay;
    this.select.append(...classes.map((name) => make("option", { value: name, textContent: name })));
    this.select.value = classes.at(-1);
    this.select.addEventListener("change", () => { this.tiles = null; this.index = null; element("strongest-place").textContent = "–"; });
    element("strongest-next").addEventListener("click", () => this.step(1));
    element("strongest-previous").addEventListener("click", () => this.step(-1));
    element("strongest-control").hidden = false;
  }

  async step(by) {
    try {
      this.tiles ??= await fetchJson(`strongest.json?class=${encodeURIComponent(this.select.value)}`);
    } catch (error) {
      fail(`The strongest tiles could not be loaded (${error.message}).`);
      return;
    }
    const count = this.tiles.length;
    element("strongest-place").textContent = count ? "" : "none";
    if (!count) return;
    this.index = this.index == null ? (by > 0 ? 0 : count - 1) : (this.index + by + count) % count;
    element("strongest-place").textContent = `${this.index + 1} / ${count}`;
    const tile = this.tiles[this.index];
    const center = this.view.place(tile.x + tile.width / 2, tile.y + tile.height / 2);
    const screen = this.map.getSize();
    const zoom = this.slide.max_zoom - Math.log2(tile.width / (Math.min(screen.x, screen.y) / 3));
    this.map.setView(center, Math.min(Math.round(zoom), this.slide.max_zoom));
    this.reader.show(tile);
  }
}

function addKeys(view) {
  const toggles = { h: "heatmap-on", c: "contours-on" };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input[type=range]")) return;
    if (event.key in toggles && !element(toggles[event.key]).closest("[hidden]")) element(toggles[event.key]).click();
    if (event.key === "0") view.fit();
  });
}

function addPrediction(parts, view) {
  const { overlay } = parts.slide;
  element("prediction").hidden = false;
  element("prediction-facts").textContent = [
    overlay.tiles ? `${whole(overlay.tiles)} tiles` : "no tissue was found",
    ...(overlay.failed ? [`${whole(overlay.failed)} not read`] : []),
  ].join(", ");
  const colors = new ClassColors(overlay.classes, overlay.colors);
  if (overlay.heatmap) addHeatmap(parts, view, overlay.heatmap);
  if (overlay.contours_bytes !== null) new Contours(parts, view, colors);
  if (overlay.tiles) {
    const reader = new TileReader(parts, view, colors);
    new StrongestTiles(parts, view, reader);
  }
}

async function start() {
  const slide = await fetchJson("slide.json");
  showFacts(slide);
  const view = new SlideMap(slide);
  const parts = { map: view.map, slide };
  keepPlace(parts, view);
  addScale(parts, view);
  addMagnifications(parts, view);
  addNavigator(parts, view);
  addKeys(view);
  if (slide.overlay) addPrediction(parts, view);
  document.body.dataset.state = "ready";
}

start().catch((error) => fail(`The slide could not be shown (${error.message}).`));
