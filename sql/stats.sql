-- purpose:    statistics of the dataset: one line per fact
-- reads:      source_status, faces_status, lang_status, prompts_status, generate_status, check_status, face_count, lang,
--             caption, image_path, image_prompt, prompt
-- returns:    section, name, rows, share
-- parameters: none
with total as (select count(*) as n from samples),
facts as (
  select 1 as place, 'rows' as section, 'all' as name, count(*) as rows from samples
  union all
  select 2, 'faces', case when face_count is null then 'unknown' when face_count >= 5 then '5 or more'
    else face_count::varchar end, count(*)
  from samples group by 3
  union all
  (select 3, 'language', coalesce(lang, 'not computed'), count(*) from samples group by 3 order by 4 desc limit 20)
  union all
  select 4, 'caption length', case when caption is null then 'none' when length(caption) = 0 then '0'
    when length(caption) < 20 then '1 to 19' when length(caption) < 50 then '20 to 49'
    when length(caption) < 100 then '50 to 99' when length(caption) < 200 then '100 to 199' else '200 or more' end, count(*)
  from samples group by 3
  union all
  select 5, 'stage ' || replace(stage, '_status', ''), coalesce(status, 'not tried'), count(*)
  from samples unpivot include nulls (
    status for stage in (source_status, faces_status, lang_status, prompts_status, generate_status, check_status)
  ) group by 2, 3
  union all
  select 6, 'edited', 'new image', count(*) from samples where image_path is not null
  union all
  select 7, 'edited', 'of these, older than its prompt', count(*)
  from samples where image_path is not null and image_prompt <> prompt
)
select section, name, rows, round(rows / nullif(n, 0), 4) as share
from facts, total
order by place, section, rows desc, name
