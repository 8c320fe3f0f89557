"""The look of a report: one style sheet, light and dark, from a telephone to a desk."""

CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --box: #ffffff; --text: #1d2126; --soft: #626a73; --line: #e2e5e8;
  --accent: #2e6fdb; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --box: #1b1f24; --text: #e4e7ea; --soft: #98a1ab;
  --line: #31373f; --accent: #5b93f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); -webkit-text-size-adjust: 100%;
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Open Sans", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 20px 56px; }
header p { margin: 0; color: var(--soft); }
h1 { margin: 0 0 2px; font-size: 27px; line-height: 1.25; font-weight: 650; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { margin: 44px 0 4px; font-size: 19px; font-weight: 650; letter-spacing: -0.005em; }
h3 { margin: 22px 0 6px; font-size: 15px; font-weight: 600; overflow-wrap: anywhere; }
p.note { margin: 0 0 12px; color: var(--soft); max-width: 74ch; }
dl { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 22px 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
@media (max-width: 640px) { dl { grid-template-columns: repeat(2, 1fr); } }
dl div { background: var(--box); padding: 11px 14px; min-width: 0; }
dt { color: var(--soft); font-size: 12.5px; }
dd { margin: 1px 0 0; font-size: 17px; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
small { display: block; color: var(--soft); font-size: 12.5px; font-weight: 400; }
.box { overflow-x: auto; background: var(--box); border: 1px solid var(--line); border-radius: 10px; }
.plot { padding: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: 12.5px; }
tr:last-child td { border-bottom: 0; }
td { vertical-align: top; }
.left { text-align: left; white-space: normal; }
.box + .note { margin-top: 10px; }
svg { display: block; width: 100%; height: auto; }
svg.wide { min-width: 700px; }
svg text { fill: var(--soft); font: 11px system-ui, "Segoe UI", Roboto, "Open Sans", Arial, sans-serif; }
svg image { image-rendering: pixelated; }
svg .frame { fill: none; stroke: var(--line); }
svg .grid { stroke: var(--line); }
svg .bar { fill: var(--accent); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 0; color: var(--soft); font-size: 12.5px; }
.legend i { display: inline-block; width: 22px; height: 11px; margin-right: 6px; border: 1px solid var(--line);
  border-radius: 2px; vertical-align: -1px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 14px; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: 12.5px; margin-top: 3px; overflow-wrap: anywhere; }
ul.dead { margin: 0; padding: 12px 14px 12px 32px; overflow-wrap: anywhere; }
footer { margin-top: 48px; color: var(--soft); font-size: 12.5px; }
"""
