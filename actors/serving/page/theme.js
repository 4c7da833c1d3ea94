// Before the first paint: the colour scheme that was chosen last time. Not a module, so that nothing is painted first.
try {
  const theme = localStorage.getItem("crsm.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // No storage: the scheme of the system.
}
