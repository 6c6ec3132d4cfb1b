"""The report's style sheet: light and dark, desktop and phone; series colours after Okabe and Ito, with markers and dashes."""

CSS = """
:root { color-scheme: light dark; --bg: #ffffff; --fg: #1b1f24; --dim: #57606a; --line: #d0d7de; --soft: #f4f6f8; --tint: #e8f1fb;
  --c1: #0072b2; --c2: #d55e00; --c3: #008a64; --c4: #a6437f; --c5: #b07900; --c6: #3a3f45; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #14181d; --fg: #e3e8ee; --dim: #9aa6b2; --line: #36404b; --soft: #1c2229; --tint: #17304a;
    --c1: #56b4e9; --c2: #f2894a; --c3: #2fc79b; --c4: #e08ac0; --c5: #f0c419; --c6: #c8d0d8; --warn: #3b3011; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header, nav { max-width: 1360px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
p { margin: .5rem 0; max-width: 80ch; }
a { color: var(--c1); }
.dim { color: var(--dim); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; list-style: none; padding: 0; margin: .8rem 0 0; }
.warn { background: var(--warn); border-radius: 6px; padding: .5rem .8rem; max-width: none; }
progress { width: min(100%, 420px); accent-color: var(--c1); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; white-space: nowrap; width: 100%; }
th, td { padding: .26rem .6rem; text-align: right; }
th.text, td.text { text-align: left; }
thead th { background: var(--soft); border-bottom: 1px solid var(--line); font-weight: 600; }
tbody th { font-weight: 400; text-align: left; }
tr.block th { font-weight: 600; border-top: 1px solid var(--line); padding-top: .5rem; }
tr.block th { position: sticky; left: 0; max-width: 90vw; white-space: normal; }
.scroll tr > :first-child { position: sticky; left: 0; background: var(--bg); }
.scroll thead th:first-child { background: var(--soft); }
tr.paper > * { color: var(--dim); font-style: italic; }
td.best { background: var(--tint); font-weight: 700; }
td.interval { font-size: .8rem; }
table.facts { width: auto; white-space: normal; }
table.facts td { overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem; margin: .8rem 0; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .2rem; }
.plots > figure { border: 1px solid var(--line); border-radius: 6px; padding: .7rem; max-width: 560px; }
figure svg { display: block; width: 100%; height: auto; }
figure ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; padding: 0; margin: .3rem 0 0; font-size: .83rem; }
figure li { display: flex; align-items: center; gap: .35rem; }
figure svg.mark { width: 26px; height: 12px; flex: none; }
svg text { fill: var(--fg); font-size: 13px; }
svg text.axis { fill: var(--dim); }
svg path { fill: none; }
svg .grid { stroke: var(--line); stroke-width: 1; opacity: .6; }
svg .line { stroke-width: 2; }
svg .error { stroke-width: 1.2; opacity: .75; }
svg .level { stroke: var(--fg); stroke-width: 1.6; stroke-dasharray: 7 4; }
svg .hollow { stroke-width: 2; }
.c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } .c6 { stroke: var(--c6); }
svg .point.c1:not(.hollow) { fill: var(--c1); } svg .point.c2:not(.hollow) { fill: var(--c2); }
svg .point.c3:not(.hollow) { fill: var(--c3); } svg .point.c4:not(.hollow) { fill: var(--c4); }
svg .point.c5:not(.hollow) { fill: var(--c5); } svg .point.c6:not(.hollow) { fill: var(--c6); }
.sheets { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem; align-items: start; }
.sheets img { max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 4px; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--dim); }
details ul { margin: .3rem 0; padding-left: 1.2rem; max-width: 100ch; }
pre { overflow-x: auto; background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem;
  font-size: .78rem; line-height: 1.35; }
.swatch { display: inline-block; width: 1.6rem; height: .9rem; border: 1px solid var(--line); border-radius: 3px; vertical-align: -1px; }
footer { max-width: 1360px; margin: 3rem auto 2rem; padding: .8rem 20px 0; border-top: 1px solid var(--line);
  color: var(--dim); font-size: .85rem; }
@media (max-width: 600px) { main, header, nav { padding: 0 12px; } footer { padding: .8rem 12px 0; } header { padding-top: 16px; }
  h1 { font-size: 1.35rem; } th, td { padding: .24rem .45rem; } }
@media print { .scroll { overflow: visible; } details { display: none; } }
"""
