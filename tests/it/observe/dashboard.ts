// What the dashboard is checked against: the types that Grafana publishes. The test appends the dashboard, and what each
// panel says for its own kind, which the dashboard's type leaves open.
import type * as published from '@grafana/schema/dist/types/raw/dashboard/x/dashboard_types.gen';
import type * as heatmap from '@grafana/schema/dist/types/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as statetimeline from '@grafana/schema/dist/types/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import type * as timeseries from '@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// JSON has no enums: where the types name one, its values are meant.
type Plain<T> = 0 extends 1 & T ? T
  : unknown extends T ? T
  : T extends string ? `${T}`
  : T extends number ? T
  : T extends object ? { [K in keyof T]: Plain<T[K]> }
  : T;

// What belongs to Prometheus as a source has no published type.
type Annotation = published.AnnotationQuery & { expr: string; step: string; titleFormat: string; textFormat: string };
type Dashboard = Plain<Omit<published.Dashboard, 'annotations'> & { annotations: { list: Annotation[] } }>;
type Target = {
  refId: string;
  datasource: { type: 'prometheus'; uid: string };
  editorMode: 'code';
  expr: string;
  legendFormat: string;
  range: true;
  format?: 'heatmap';
};
type Kind<Options, FieldConfig> = { options: Plain<Options>; custom: Plain<FieldConfig>; targets: Target[] };
type Kinds = {
  'heatmap': Kind<heatmap.Options, heatmap.FieldConfig>;
  'state-timeline': Kind<statetimeline.Options, statetimeline.FieldConfig>;
  'timeseries': Kind<timeseries.Options, timeseries.FieldConfig>;
};
